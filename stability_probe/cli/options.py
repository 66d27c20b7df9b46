"""The options that commands on a checkpoint share, and how their texts are read."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from stability_probe.errors import StabilityProbeError

Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A diffusers folder, .safetensors, .pt, .pth, .ckpt, .bin, a folder of these, or a "
        ".pt2 of torch.export."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Function or class that makes the network the weights are for. Importing and calling "
        "it runs that code, with your rights.",
    ),
]
ModelArgs = Annotated[
    str, typer.Option("--model-args", metavar="JSON", help="Its arguments, as a JSON object.")
]
Weights = Annotated[
    str, typer.Option(help="Which weights: model, ema, or a name among several in the file.")
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read the file even if that runs code from it (pickles of more than tensors, .pt2).",
    ),
]
Partial = Annotated[
    bool,
    typer.Option("--partial", help="Load the weights that fit and list the others, no error."),
]
Skips = Annotated[
    list[str] | None,
    typer.Option(
        "--skips",
        metavar="SOURCE=SINK",
        help="Take the merges between these modules as the long skips, instead of finding them; "
        "* and ? match. May be repeated.",
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPE|PATH",
        help="Shape of one input (C,H,W or C,D,H,W or C,L), a folder of images, or a .npy or .npz "
        "of samples. Default: Gaussian noise of the shape that the model's configuration tells.",
    ),
]
Arguments = Annotated[
    Path | None,
    typer.Option(
        "--kwargs",
        metavar="FILE.npz",
        help="Values of the network's other arguments, by name, one row a sample.",
    ),
]
NoiseLevels = Annotated[
    str | None,
    typer.Option(metavar="T,T,...", help="Noise levels. Default: a low, a middle, a high one."),
]
Scheme = Annotated[
    str | None, typer.Option(help="Scale the skips first, by a scheme that `train` knows.")
]
Sensitive = Annotated[int, typer.Option(help="How many of the samples Jacobians are taken on.")]
Batch = Annotated[int, typer.Option(help="Samples at each noise level.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ....")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of noise, conditions and directions.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class SubjectOptions:
    """What a user said of the network to look at; see the options above."""

    checkpoint: Path
    model: str | None = None
    model_args: str = "{}"
    weights: str = "model"
    trust_pickle: bool = False
    partial: bool = False
    skips: list[str] = field(default_factory=list)
    input: str | None = None
    kwargs: Path | None = None
    batch: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def parse_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of patterns.

    Raises:
        StabilityProbeError: if one has not the form SOURCE=SINK.

    >>> parse_pairs(["encoder.*=decoder.*"])
    [('encoder.*', 'decoder.*')]
    """
    pairs = [text.partition("=") for text in texts]
    for text, (_, sign, sink) in zip(texts, pairs, strict=True):
        if not sign or not sink:
            raise StabilityProbeError(
                f"--skips {text!r}: must be SOURCE=SINK, as in 'down.*=up.*' (an empty source is "
                "the input)"
            )
    return [(source, sink) for source, _, sink in pairs]


def parse_shape(text: str) -> tuple[int, ...] | None:
    """A shape such as 3,32,32; `None` if the text is none.

    >>> parse_shape("3,32,32"), parse_shape("images/")
    ((3, 32, 32), None)
    """
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        StabilityProbeError: if one is none.

    >>> parse_numbers("50,500", "--noise-levels")
    [50.0, 500.0]
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise StabilityProbeError(
            f"{option} {text!r}: must be numbers with commas between them, as in 50,500,950"
        )
    return numbers


def parse_json_object(text: str, option: str) -> dict[str, Any]:
    """The object in an option's JSON.

    Raises:
        StabilityProbeError: if the text is something else.

    >>> parse_json_object('{"width": 8}', "--model-args")
    {'width': 8}
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StabilityProbeError(f"{option}: is not JSON ({error}), got {text!r}") from error
    if not isinstance(value, dict):
        raise StabilityProbeError(f'{option}: must be a JSON object as in {{"a": 1}}, got {text!r}')
    return value
