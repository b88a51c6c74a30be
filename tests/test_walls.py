"""The layers of the house, lowest first: a module imports from its own layer and those below it, wings not from each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # names of modules, or of packages for all that is in them
    {"cdiffset", "cdiffset.errors", "cdiffset.pipeline", "cdiffset.ranks", "cdiffset.squeezenet"},
    {"cdiffset.images", "cdiffset.config", "cdiffset.device", "cdiffset.losses", "cdiffset.pages"},
    {"cdiffset.pairing", "cdiffset.checkpoint", "cdiffset.hub", "cdiffset.adapter", "cdiffset.model"},
    {"feeders", "utils"},
    {"cdiffset.inference"},
    {"cdiffset.evaluation"},
    {"cdiffset.calibration"},
    {"cdiffset.scenes", "cdiffset.auditing", "cdiffset.training"},
    {"train"},
    {"main", "test", "evaluate", "calibrate", "audit", "export", "app", "data", "demo", "results"},
]
WINGS = {
    name for layer in LAYERS for name in layer if name.startswith("cdiffset.") and (ROOT / name.replace(".", "/")).is_dir()
}


def place(module: str) -> tuple[int, str] | None:
    """(layer, its name there) of a module of this project; None of another origin."""
    names = [module.rsplit(".", k)[0] for k in range(module.count(".") + 1)]
    return next(((level, name) for name in names for level, layer in enumerate(LAYERS) if name in layer), None)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_imports_from_its_own_layer_or_below():
    files = [
        *ROOT.glob("*.py"),
        *(file for folder in ("cdiffset", "feeders", "data", "demo") for file in ROOT.glob(f"{folder}/**/*.py")),
    ]
    assert len(files) > 40
    for file in files:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        level, name = place(module)
        for other in filter(None, map(place, imports(file))):
            is_side_wing = other[0] == level and name != other[1] and {name, other[1]} & WINGS
            assert other[0] <= level and not is_side_wing, f"{module} imports {other[1]}"
