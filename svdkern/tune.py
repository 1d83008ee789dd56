"""``python -m svdkern tune``: measure the paths of layers on this machine, and keep which is the fastest.

With ``--device cuda``: the tiles of the Triton kernels on this GPU.

Layer: below ``cli``. Measuring is ``backends/measure.py``, keeping ``backends/tuned.py`` (for a GPU ``triton_tune.py`` and
``triton_tiles.py`` there); here is what to measure, and the report.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from svdkern import timing
from svdkern.backends import choices, cpu, extension, triton, triton_tiles, triton_tune, tuned
from svdkern.backends.measure import seconds_of_paths
from svdkern.backends.table import DTYPES, PATHS, Row, Shape, Table, read_table, write_table
from svdkern.model_files import ModelFiles

SLOWEST = 1.0
"""Seconds of one forward and backward beyond which a path is not timed."""

GRID_ROWS = (1, 4, 16, 32, 64, 256, 1024, 4096)
GRID_WEIGHTS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096))
GRID_RANKS = (16, 128)
"""The layers of the shipped table: within an octave of most layers of models up to 8B."""

_DESCRIPTION = """\
Measure layers on this machine and keep which path is the fastest for each.

A layer y = x W^T + s ((x U) * sigma) V^T on the CPU can be computed
  fused   by one C++ call for the forward and one for the backward,
  steps   by the same formula as calls, the base product PyTorch's where that is a fast one,
  eager   by PyTorch's operators alone.
Which one is fastest depends on the machine and on M (rows of x), K, N (weight N x K) and r (rank). Without tuning,
svdkern takes a table that was measured before it was shipped and, for a layer that is far from all in it, a rule:
`python -m svdkern doctor --shape MxKxNxr` shows both. A measurement replaces that choice only where another path takes
at least 3 % less time for a forward and backward. It serves layers up to an octave (a factor of 2) away in M, K and N,
too. Quiet the machine first, and set the number of threads that you train with (OMP_NUM_THREADS).

With --device cuda it measures, instead of paths, the tiles that the Triton kernels of a layer's forward and backward are
launched with on this GPU: a short list of candidates, each compiled and checked against float64 before it is timed.
"""

_EXAMPLES = """\
examples:
  python -m svdkern tune --shapes 2048x576x1536x16 1x4096x4096x16 --dtypes bfloat16
  python -m svdkern tune --model ~/models/Llama-3.2-1B --rows 512 4096 --rank 16      its linear layers
  python -m svdkern tune --model ~/models/Llama-3.2-1B --dry-run                      what that would measure
  python -m svdkern tune --device cuda --shapes 8192x4096x4096x16 --dtypes bfloat16   tiles of the Triton kernels
  python -m svdkern tune --clear                                                      forget all

What is measured is kept in $SVDKERN_CACHE_DIR, else $XDG_CACHE_HOME/svdkern, else ~/.cache/svdkern, for this build of
svdkern, torch, instruction set and number of threads: others do not see it. Programs read it when they start. In a
distributed job it is not used, so that all ranks choose alike. SVDKERN_AUTOTUNE=1 measures in a running program, at the
first call of a layer (up to 0.3 s each).
"""


def add_tune(commands: Any) -> None:
    """Add the command to the command line's sub-parsers."""
    parser = commands.add_parser(
        "tune",
        help="measure layers on this machine, and keep which path is the fastest",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure on (default: cpu)")
    what = parser.add_argument_group("what to measure (together, if several are given)")
    what.add_argument("--shapes", metavar="MxKxNxr", type=shape_of, nargs="+", default=[], help="layers")
    what.add_argument(
        "--model", metavar="DIR", type=Path, help="the linear layers of a model: a folder with *.safetensors"
    )
    what.add_argument("--rows", metavar="M", type=_positive, nargs="+", default=[1, 16, 512, 2048],
                      help="rows of x for --model: batch x sequence length in training (default: 1 16 512 2048)")  # fmt: skip
    what.add_argument("--rank", metavar="r", type=_positive, nargs="+", default=[16], help="for --model (default: 16)")
    what.add_argument("--grid", action="store_true", help="the layers of the CPU's shipped table (about 3 minutes)")
    what.add_argument("--dtypes", metavar="DTYPE", choices=DTYPES, nargs="+", default=list(DTYPES),
                      help=f"of activations and weight: {' '.join(DTYPES)} (default: all)")  # fmt: skip
    parser.add_argument("--seconds", metavar="S", type=_seconds, default=0.3, help="for each layer (default: 0.3)")
    parser.add_argument("--stop-after", metavar="S", type=_seconds, default=math.inf,
                        help="with --device cuda: begin nothing new after so many seconds (most go into compiling)")  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="show the layers and their present choice; measure nothing"
    )
    parser.add_argument("--clear", action="store_true", help="first forget what was measured before, in every version")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="add the rows to a table like the shipped one, instead of keeping them for this user")  # fmt: skip
    parser.set_defaults(run=lambda options: tune(options, parser))


def tune(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, keep and report; 0 if that was done."""
    timing.keep_freed_memory()
    shapes = list(options.shapes)
    if options.model is not None:
        try:
            weights = weights_of_model(options.model)
        except (OSError, ValueError) as error:
            parser.error(f"--model {options.model}: {error}")
        shapes += [Shape(m, k, n, r) for k, n in weights for r in options.rank for m in sorted(options.rows)]
    if options.grid:
        shapes += [Shape(m, k, n, r) for k, n in GRID_WEIGHTS for r in GRID_RANKS for m in GRID_ROWS]
    if not shapes and not options.clear:
        parser.error("nothing to measure: give --shapes, --model or --grid")
    on_gpu = options.device == "cuda"
    if options.grid and on_gpu:
        parser.error("--grid has the layers of the CPU's table: give --shapes or --model")
    if choices.distributed():
        parser.error("this is one of several ranks (WORLD_SIZE): measure in a process of its own")
    if options.clear and not options.dry_run:
        if on_gpu:
            print(f"forgot {triton_tiles.clear()} tables of tiles in {tuned.base_folder()}")
        else:
            print(f"forgot {tuned.clear()} choices in {tuned.base_folder()}")
            choices.forget()
    if not shapes:
        return 0
    if on_gpu:
        return _tune_tiles(options, parser, list(dict.fromkeys(shapes)))
    if extension.why_missing is not None:
        print(f"nothing to choose from: the compiled extension is missing ({extension.why_missing})")
        return 1
    try:
        cpu.isa()
    except RuntimeError as error:  # a wrong SVDKERN_CPU_ISA
        parser.error(f"{error}".splitlines()[0])
    layers = [
        (shape, getattr(torch, name)) for name in dict.fromkeys(options.dtypes) for shape in dict.fromkeys(shapes)
    ]
    if options.dry_run:
        for line in _present(layers):
            print(line)
        return 0
    table = Table()
    if options.out is not None:
        if not options.out.absolute().parent.is_dir():
            parser.error(f"--out {options.out}: there is no such folder")
        try:
            table = read_table(options.out) if options.out.exists() else table
        except (OSError, ValueError) as error:
            parser.error(f"--out {options.out}: {error}")
    return _measure(layers, options.seconds, options.out, table)


def _measure(layers: Sequence[tuple[Shape, torch.dtype]], seconds: float, out: Path | None, table: Table) -> int:
    rows: list[Row] = []
    kept, status = 0, 0
    print(f"{cpu.isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(_HEADER)
    progress = tqdm(layers, unit="layer", leave=False)
    try:
        for shape, dtype in progress:
            progress.set_description(f"{_name(dtype)} {shape}")
            # a table to be shipped must not depend on the one that was
            before = choices.choose(shape, dtype, use_tuned=False) if out is None else choices.rule(shape, dtype)
            paths = {path: cpu.PATHS[path] for path in choices.paths_to_measure(shape, dtype)}
            times = seconds_of_paths(shape, dtype, paths, seconds=seconds, slowest=SLOWEST)
            row = choices.measured(shape, dtype, times, before.path)
            tqdm.write(_line(shape, dtype, times, row, before))
            if row is not None:
                rows.append(row)
                kept += out is None and tuned.save(row) is not None
    except KeyboardInterrupt:
        print("stopped; what was measured until now is kept")
        status = 130
    finally:
        progress.close()
        if out is not None:
            for row in rows:
                table.add(row)
            write_table(out, table)
    if out is not None:
        print(f"{out}: {len(rows)} rows of this run, {len(table)} altogether")
    elif kept < len(rows):
        print(f"{len(rows) - kept} of {len(rows)} choices could not be saved: programs will not see them")
        status = status or 1
    else:
        print(f"saved {kept} choices in {tuned.folder()}")
    return status


def _tune_tiles(options: argparse.Namespace, parser: argparse.ArgumentParser, shapes: Sequence[Shape]) -> int:
    """The same for the Triton kernels on the current GPU; what is measured is kept at once, a layer at a time."""
    dtypes = [getattr(torch, name) for name in dict.fromkeys(options.dtypes)]
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    reason = "there is no CUDA device" if not torch.cuda.is_available() else triton.why_not(device, dtypes[0])
    if reason is not None:
        print(f"nothing to measure on: {reason}")
        return 1
    out, gpu, deadline = options.out, triton_tiles.gpu_name(device), time.monotonic() + options.stop_after
    try:
        rows = triton_tiles.read_rows(out) if out is not None and out.exists() else []
    except (OSError, ValueError) as error:
        parser.error(f"--out {out}: {error}")
    place = out if out is not None else triton_tiles.user_file(gpu)
    print(f"{gpu}, triton {triton_tiles.triton_version()}, torch {torch.__version__}")
    layers = [(shape, dtype, family) for dtype in dtypes for shape in shapes for family in triton_tune.families(shape)]
    if options.dry_run:
        for shape, dtype, family in layers:
            print(f"{_sizes(shape, dtype)}  {family}")
        return 0
    kept = 0
    try:
        for shape, dtype, family in layers:
            if time.monotonic() > deadline:
                print(f"stopped after {options.stop_after:g} s")
                break
            found, row = triton_tune.measure(family, shape, dtype, device, seconds=options.seconds, deadline=deadline)
            for line in _tile_lines(shape, dtype, family, found, row):
                print(line, flush=True)
            if row is None:
                continue
            if out is not None:
                rows.append(row)
                triton_tiles.write_rows(out, rows)
                out.chmod(0o644)
            else:
                triton_tiles.save([row], gpu)
            kept += 1
    except KeyboardInterrupt:
        print("stopped; what was measured until now is kept")
        return 130
    except OSError as error:
        print(f"tiles could not be saved: {error}")
        return 1
    print(f"saved tiles for {kept} of {len(layers)} layers and families in {place}")
    return 0 if kept else 1


def weights_of_model(folder: Path) -> list[tuple[int, int]]:
    """(K, N) of the linear layers in a folder of safetensors files, read from their headers; each size once.

    Raises:
        OSError, ValueError: as ``ModelFiles.open``; there are no such layers.
    """
    files = ModelFiles.open(folder)
    shapes = [stored.shape for name, stored in files.tensors.items() if files.is_linear(name)]
    found = dict.fromkeys((k, n) for n, k in shapes if min(n, k) > 1)
    if not found:
        raise ValueError("there is no linear layer in its files (two-dimensional '*.weight')")
    return list(found)


# ---- words ---------------------------------------------------------------------------------------------------------------

_HEADER = f"{'dtype':<10}{'M':>7}{'K':>7}{'N':>7}{'r':>5}{'fused':>11}{'steps':>11}{'eager':>11}  choice"


def _line(
    shape: Shape, dtype: torch.dtype, times: dict[str, float | None], row: Row | None, before: choices.Choice
) -> str:
    columns = "".join(f"{_time(times.get(path)):>11}" for path in PATHS)
    if row is None:
        what = f"not measured: every path takes more than {SLOWEST:g} s"
    elif row.choice == before.path:
        what = f"{row.choice}, as before ({before.source})"
    else:
        what = f"{row.choice} instead of {before.path} ({before.source})"
    return f"{_sizes(shape, dtype)}{columns}  {what}"


def _tile_lines(
    shape: Shape, dtype: torch.dtype, family: str, found: triton_tune.Found, row: triton_tiles.Row | None
) -> Iterator[str]:
    if row is None:
        yield f"{_sizes(shape, dtype)}  {family:<9} no candidate could be run"
    else:
        rule = "none" if row.rule_s is None else _time(row.rule_s)
        tiles = "x".join(map(str, row.config[:3]))
        yield f"{_sizes(shape, dtype)}  {family:<9} rule {rule:>8}  best {_time(row.seconds):>8}  {tiles} {row.config}"
    for config, problem in found.problems.items():
        yield f"    left out: {'x'.join(map(str, config))}: {problem}"


def _present(layers: Iterable[tuple[Shape, torch.dtype]]) -> Iterator[str]:
    yield f"{cpu.isa()}, {torch.get_num_threads()} threads; rows would be saved in {tuned.folder()}"
    for shape, dtype in layers:
        choice = choices.choose(shape, dtype)
        yield f"{_sizes(shape, dtype)}  {choice.path} ({choice.source})"


def _sizes(shape: Shape, dtype: torch.dtype) -> str:
    return f"{_name(dtype):<10}{shape.M:>7}{shape.K:>7}{shape.N:>7}{shape.r:>5}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    unit, scale = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("µs", 1e-6))
    return f"{seconds / scale:.3g} {unit}" if seconds < 100 * scale else f"{seconds / scale:.0f} {unit}"


def shape_of(text: str) -> Shape:
    """MxKxNxr as a layer; for ``argparse``."""
    try:
        sizes = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not MxKxNxr with positive sizes, as 1024x576x1536x16")
    return Shape(*sizes)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 3600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds, above 0")
    return seconds
