"""``python -m svdkern init``: an adapter for a model that stays on the disk.

Layer: below ``cli``; the work is ``streaming``'s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from svdkern.methods import METHODS
from svdkern.streaming import init_adapter
from svdkern.targets import ALL_LINEAR
from svdkern.workspace import Workspace

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_DESCRIPTION = """\
Decompose the linear layers of a model and write the adapter to start training from, without loading the model.

MODEL_DIR is a folder of *.safetensors files (with model.safetensors.index.json if there are several). Weights are read one at a
time, so the model may be larger than memory: a 7B model in bfloat16 needs less than 1.5 GB. For each layer W (out x in)

  pissa   W = W_res + s V U^T          U = Q sqrt(S/s), V = P sqrt(S/s), both train
  sorsa   W = W_res + s V diag(S) U^T  U = Q, V = P, S train

with the leading singular triplets P, S, Q of W. OUT gets adapter.safetensors and adapter_config.json, which
svdkern.load_adapter(model, OUT) puts on the loaded model: the same bits as svdkern.adapt(model, method, rank) gives there.
"""

_EXAMPLES = """\
examples:
  python -m svdkern init ~/models/Llama-2-7b-hf --method pissa --rank 16 -o my-adapter
  python -m svdkern init ~/models/Llama-2-7b-hf --rank 128 --target-modules q_proj v_proj -o my-adapter
  python -m svdkern init ~/models/Llama-2-7b-hf --rank 16 -o my-adapter --residual my-residual-model

then, in Python:
  model = AutoModelForCausalLM.from_pretrained("~/models/Llama-2-7b-hf", dtype="auto")   # the dtype of the files
  svdkern.load_adapter(model, "my-adapter")

Interrupted (Ctrl-C, a full disk, a crash) it leaves OUT as it was until all layers are finished, and whole from then on. Finished
layers are in OUT.partial, finished files of the residual model in DIR.partial: the same command goes on from there. Delete both to
start anew.
"""


def add_init(commands: Any) -> None:
    """Add the command to the command line's sub-parsers."""
    parser = commands.add_parser(
        "init",
        help="make a model's initial adapter without loading the model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder with *.safetensors files")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="adapter directory to write")
    named = ", ".join(name for name, method in METHODS.items() if not (method.draws or method.needs))
    parser.add_argument("--method", default="pissa", help=f"{named} (default: pissa)")
    parser.add_argument("--rank", metavar="r", type=int, help="of every layer (default: 16)", default=16)
    parser.add_argument("--alpha", type=float, help="scale s = alpha / rank (default: s = 1)")
    parser.add_argument(
        "--dropout", metavar="p", type=float, default=0.0, help="on the adapters' input in training (default: 0)"
    )
    parser.add_argument(
        "--target-modules", metavar="NAME", nargs="+", default=[ALL_LINEAR],
        help="layers by path or its last part, as q_proj (default: all-linear, every linear layer but the output embedding)",
    )  # fmt: skip
    parser.add_argument("--exclude-modules", metavar="NAME", nargs="+", help="layers to leave alone")
    parser.add_argument(
        "--adapter-dtype", choices=_DTYPES, default="float32", help="of the factors that train (default: float32)"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="that the model will be loaded in, if not the files' (an adapter belongs to one)",
    )
    parser.add_argument(
        "--residual", metavar="DIR", type=Path,
        help="also write the model with W_res in place of each adapted W, into a new directory; its other files are copied, "
        "but for hidden ones and weights in other formats",
    )  # fmt: skip
    parser.set_defaults(run=lambda options: init(options, parser))


def init(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make the adapter and report; 0 if it is there."""
    targets = ALL_LINEAR if options.target_modules == [ALL_LINEAR] else options.target_modules
    workspace = Workspace(options.out)  # now: a current directory that is replaced can no longer be found
    before = _directory(workspace.result)
    try:
        made = init_adapter(
            options.model,
            options.out,
            options.method,
            options.rank,
            targets,
            exclude_modules=options.exclude_modules,
            alpha=options.alpha,
            dropout_p=options.dropout,
            adapter_dtype=_DTYPES[options.adapter_dtype],
            dtype=_DTYPES[options.dtype] if options.dtype else None,
            residual=options.residual,
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        print(f"{error}\n{_what_is_left(workspace, before)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: {_what_is_left(workspace, before)}", file=sys.stderr)
        return 130
    resumed = f" ({made.resumed} of them by an earlier run)" if made.resumed else ""
    print(f"{made.layers} layers decomposed{resumed}; {made.parameters:,} parameters will train")
    print(f"{options.out}: {made.adapter_bytes / 1e6:.1f} MB; put it on the model with svdkern.load_adapter")
    if options.residual:
        print(f"{options.residual}: the model with residuals")
    return 0


def _directory(path: Path) -> tuple[int, int] | None:
    """Which directory is there: another one once OUT has been replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _what_is_left(workspace: Workspace, before: tuple[int, int] | None) -> str:
    if _directory(workspace.result) == before:
        return "OUT is as it was; finished layers are kept, and the same command goes on from there"
    if workspace.folder.exists():
        return "OUT is the new adapter; what else is finished is kept, and the same command goes on from there"
    return "but everything is finished"
