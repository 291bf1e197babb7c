"""The frontier of fidelity over size: KL divergence against bits per weight, for precast, llama.cpp and OpenVINO.

All engines start from one float32 file of each model. Three variants are compared: "off-grid" and "dithered", whose
weights no format holds exactly, and "published", which has the values of the published, quantised file (`off_grid.py`).

The divergence is that to precast's float32 model, on the text of `precast eval`, by the method of `fidelity.py`: half
of each window is prefilled and half decoded, each engine with its own arithmetic. The bits per weight count all bytes
of weights, with scales, norms and embedding. precast, the importance matrices of llama.cpp and OpenVINO's INT4 are
calibrated with the same 8,192 tokens of another text, the documentation that Python contains.

    .venv-bench/bin/python benchmarks/peers/frontier.py --precast-python .venv/bin/python [--models …] [--variants …]

It writes benchmarks/results/frontier.json after each point, and then frontier.svg; the output is a table. Points that
the JSON file has already are kept; --again measures them again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
import fidelity
import frontier_files
import frontier_picture
import llama_tools
import machine
import off_grid
from contenders import THREADS, Contender
from processes import Worker

RESULTS = Path(__file__).parents[1] / "results"
TOKENS, WINDOW = 3072, 512
# Budgets of bits for precast. The smallest that a model allows depends on its shape.
BITS: Mapping[str, Sequence[float]] = {
    "smollm2-135m": (5, 6.17, 4.6, 5.5, 7, 8.5),
    "gemma3-270m": (4.6, 5, 5.5, 6.17, 7, 8.5),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A file of a model to measure.

    Attributes:
        engine: "precast", "llama.cpp" or "OpenVINO".
        label: the name of the file's format in tables and pictures.
        file: its name in `frontier_files`; for precast the name of the artifact.
        options: options of precast's export.
    """

    engine: str
    label: str
    file: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.engine} {self.label}"


# For each engine its worker, its interpreter and the options of its worker.
_ENGINES: Mapping[str, tuple[str, str, Mapping[str, object]]] = {
    "precast": ("precast_worker", "precast", {}),
    # Its threads wait for each other in loops, which takes minutes on a busy machine, and change no figure.
    "llama.cpp": ("llama_cpp_worker", "peers", {"threads": 1}),
    "OpenVINO": ("openvino_worker", "peers", {"pipeline": False}),
    "transformers": ("transformers_worker", "peers", {}),
}
_REFERENCE = Point(engine="precast", label="float32", file="float32", options=("--weights", "float32"))


def points(model: str, variant: str) -> Iterator[Point]:
    """Yield the points of a variant of a model, those that take the least time first."""
    yield Point(engine="precast", label="int8", file="int8", options=("--weights", "int8"))
    for each in frontier_files.TYPES:
        yield Point(engine="llama.cpp", label=each, file=f"{each}.gguf")
    if llama_tools.missing():
        print(
            "llama.cpp's tools are missing: leaving out its files with an importance matrix", file=sys.stderr
        )
    else:
        for each in frontier_files.IMATRIX_TYPES:
            yield Point(engine="llama.cpp", label=f"{each} imatrix", file=f"{each}-imatrix.gguf")
    if variant == "published":
        yield Point(engine="precast", label="source", file="source", options=("--weights", "source"))
    for bits in BITS[model]:
        yield Point(
            engine="precast", label=f"--bits {bits:g}", file=f"{bits:g}", options=("--bits", f"{bits:g}")
        )
    text = ("--calibrate", str(frontier_files.derive.cache("frontier/calibration.txt")))
    int4 = ("--weights", "int4", *text)
    yield Point(engine="precast", label="int4 calibrated", file="int4", options=int4)
    yield Point(engine="OpenVINO", label="INT8", file="openvino-int8")
    yield Point(engine="OpenVINO", label="INT4 data-aware", file="openvino-int4")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A variant of a model.

    Attributes:
        model: a key of `frontier_files.MODELS`.
        variant: one of `off_grid.VARIANTS`.
        interpreters: paths of the interpreters "peers" and "precast".
        folder: a temporary folder.
    """

    model: str
    variant: str
    interpreters: Mapping[str, str]
    folder: Path

    def start(self, point: Point) -> tuple[Worker, Path]:
        """Make the file of a point and start its worker; return both."""
        if point.engine == "precast":
            path = frontier_files.export(
                self.model, self.variant, point.file, point.options, self.interpreters
            )
        else:
            name = frontier_files.name_of(self.model, self.variant, point.file)
            path = frontier_files.obtain(name, self.interpreters)
        module, whose, options = _ENGINES[point.engine]
        contender = Contender(
            label=point.name, group="", worker=module, interpreter=whose, model="", options=options
        )
        return Worker(contender, path, self.interpreters[whose], self.folder / "worker.log"), path


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The predictions of a float32 model.

    Attributes:
        windows: token ids of each window.
        files: the logits of each window.
        weights: number of the model's weights.
    """

    windows: Sequence[Sequence[int]]
    files: Sequence[Path]
    weights: int


def refer(place: Place, *, again: bool) -> Reference:
    """Return the reference's predictions, from `derive.cache` unless they are missing or `again` is True."""
    folder = frontier_files.derive.cache(frontier_files.name_of(place.model, place.variant, "reference"))
    index = folder / "index.json"
    if again or not index.exists():
        worker, artifact = place.start(_REFERENCE)
        windows = worker.ask(windows=[TOKENS, WINDOW]).values["windows"]
        folder.mkdir(exist_ok=True)
        for i, ids in enumerate(windows):
            worker.ask(score=ids, first=_first(ids), out=str(folder / f"{i}.npy"))
        worker.close()
        weights = json.loads((artifact / "manifest.json").read_text())["model"]["parameters"]
        index.write_text(json.dumps({"windows": windows, "weights": weights}))
    known = json.loads(index.read_text())
    files = [folder / f"{i}.npy" for i in range(len(known["windows"]))]
    return Reference(windows=known["windows"], files=files, weights=known["weights"])


def _first(ids: Sequence[int]) -> int:
    return len(ids) // 2 - 1


def measure(worker: Worker, reference: Reference, folder: Path) -> dict:
    """Return the divergence of a worker's predictions from the reference's."""
    kl, same = [], []
    for ids, file in zip(reference.windows, reference.files, strict=True):
        worker.ask(score=list(ids), first=_first(ids), out=str(folder / "other.npy"))
        for expected, got in zip(
            np.load(file, mmap_mode="r"), np.load(folder / "other.npy", mmap_mode="r"), strict=True
        ):
            kl.append(fidelity.divergences(expected[None], got[None]))
            same.append(expected.argmax() == got.argmax())
    return fidelity.summary(np.concatenate(kl), np.array(same))


def measure_point(place: Place, point: Point, reference: Reference) -> dict:
    """Return the size and the divergence of a point."""
    worker, _ = place.start(point)
    stored = worker.ask(weights=True).values["bytes"]
    found = measure(worker, reference, place.folder)
    worker.close()
    size = {
        "engine": point.engine,
        "label": point.label,
        "bytes": stored,
        "bits": 8 * stored / reference.weights,
    }
    return size | found


def unchanged(place: Place, reference: Reference) -> dict[str, float]:
    """Return the mean divergence of models that should compute the same as the reference.

    They are transformers with the same values and, for "off-grid", precast with the published values, both in float32.
    One window is enough for it, and saves minutes.
    """
    reference = replace(reference, windows=reference.windows[:1], files=reference.files[:1])
    huggingface = Point(engine="transformers", label="float32", file="huggingface")
    published = replace(place, variant="published")
    others = [("transformers", place, huggingface)]
    if place.variant == "off-grid":
        others.append(("published", published, _REFERENCE))
    found = {}
    for name, where, point in others:
        worker, _ = where.start(point)
        found[name] = measure(worker, reference, place.folder)["kl_mean"]
        worker.close()
    return found


def run(place: Place, found: dict, save: Callable[[], None], *, again: bool) -> None:
    """Measure the points of a variant of a model; call `save` after each."""
    wanted = [
        point for point in points(place.model, place.variant) if again or point.name not in found["points"]
    ]
    if not wanted:
        return
    reference = refer(place, again=again)
    found["weights"] = reference.weights
    if again or "unchanged" not in found:
        found["unchanged"] = unchanged(place, reference)
        save()
    for point in wanted:
        found["points"][point.name] = measure_point(place, point, reference)
        save()
        print(row(found["points"][point.name]), file=sys.stderr, flush=True)


def row(point: Mapping) -> str:
    return (
        f"| {point['engine']} {point['label']} | {point['bits']:.2f} | {point['kl_mean']:.4f}"
        f" | {point['kl_p99']:.3f} | {point['top1']:.1%} |"
    )


def table(result: Mapping) -> str:
    """Return the points by size, in Markdown."""
    lines = []
    for model, variants in result["models"].items():
        for variant, found in variants.items():
            head = f"| {frontier_files.MODELS[model][0]}, {variant} | bits | KL | 99% | same top token |"
            ordered = sorted(found["points"].values(), key=lambda point: point["bits"])
            lines += ["", head, "|---|---:|---:|---:|---:|", *map(row, ordered)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models, variants = list(frontier_files.MODELS), list(off_grid.VARIANTS)
    parser.add_argument("--precast-python", default=".venv/bin/python", help="a Python with precast[export]")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--again", action="store_true", help="measure again what the JSON file has already")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    interpreters = {"peers": sys.executable, "precast": str(Path(arguments.precast_python).absolute())}
    path = arguments.output / "frontier.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {"benchmark": "frontier", "threads": THREADS, "models": result.get("models", {})}

    def save() -> None:
        described = machine.describe(("llama-cpp-python", "openvino", "nncf", "transformers", "torch"))
        path.write_text(json.dumps(result | described, indent=1) + "\n")

    for variant in arguments.variants:
        for model in arguments.models:
            found = result["models"].setdefault(model, {}).setdefault(variant, {"points": {}})
            with tempfile.TemporaryDirectory(prefix="precast-bench-") as folder:
                place = Place(model=model, variant=variant, interpreters=interpreters, folder=Path(folder))
                run(place, found, save, again=arguments.again)
            frontier_picture.draw(result, arguments.output / "frontier.svg")
    print(table(result))


if __name__ == "__main__":
    main()
