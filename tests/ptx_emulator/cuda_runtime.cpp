// The part of the CUDA runtime that launchers use, for a library whose kernels the PTX emulator runs: a launch calls
// back with the kernel's name, the geometry and the arguments, as the launcher gave them. cuda.py builds it, and sets
// the callback.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using Callback = int (*)(const char* kernel, const unsigned* geometry, void** arguments);

Callback callback = nullptr;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_stubs;
  return of_stubs;
}
std::map<const void*, size_t>& granted() {
  static std::map<const void*, size_t> shared;
  return shared;
}
constexpr size_t unasked = 48 << 10;
int processors = 1, most_shared = 227 << 10;  // of the device that there is not

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulate_launches(Callback with) { callback = with; }

__attribute__((visibility("default"))) void emulate_device(int with_processors, int with_shared) {
  processors = with_processors, most_shared = with_shared;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount && attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin)
    return cudaErrorInvalidValue;
  *value = attribute == cudaDevAttrMultiProcessorCount ? processors : most_shared;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const auto granted_to = granted().find(stub);
  if (shared > static_cast<size_t>(most_shared) ||
      shared > (granted_to == granted().end() ? unasked : granted_to->second))
    return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (callback == nullptr || names().count(stub) == 0) return cudaErrorInvalidDeviceFunction;
  const unsigned geometry[] = {
      grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared), granted_to != granted().end()};
  return callback(names()[stub].c_str(), geometry, arguments) ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value > most_shared) return cudaErrorInvalidValue;
  granted()[stub] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* stub) {
  return names().count(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the emulator says why" : "a launch that CUDA refuses";
}

// what nvcc's stubs call: kernels are known by the address of their stub

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[stub] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // the emulator has the PTX's own
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
}
