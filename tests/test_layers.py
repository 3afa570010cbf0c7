"""Allowed imports between parts of the package."""

import ast
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "src" / "mlxchat").rglob("*.py"))
STAGES = sorted(path for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
RUNNER = [path for path in LIBRARY if path.parent.name in ("runner", "store")]
# The library's parts from the bottom up. A part may import those of its own line and of earlier ones, never later ones.
LAYERS = [
    {"errors"},
    {"config", "ops", "sandbox"},
    {"distributed"},
    {"store"},
    {"runner"},
    {"hub"},
    {"tasks"},
    {"data"},
    {"model"},
    {"interop"},
    {"planning"},
    {"optim", "engine"},
    {"evals"},
    {"training"},
    {"cpu"},
    {"rl"},
    {"bench"},
    {"report"},
    {"artifact"},
    {"composition", "trackers", "terminal", "serve", "distill"},
    {"pipeline"},
    {"sweep"},
    {"commands"},
    {"cli"},
]
ROOTS = ("__init__.py", "__main__.py")  # the package itself

# Threads of the BLAS are set here, where it is loaded; otherwise `cpu` installs itself from outside.
MAY_IMPORT_CPU = {"src/mlxchat/ops/device.py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Return the dotted names that a file imports: anywhere in it, or only when it is itself imported."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def packages(path: Path, **options: bool) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {module.split(".")[0] for module in imports(path, **options)}


def offenders(paths: list[Path], wrong: Callable[[Path], set[str]]) -> dict[str, set[str]]:
    """Return file → what is wrong with it, for files with something wrong."""
    return {name(path): found for path in paths if (found := wrong(path))}


def beginning_with(path: Path, *forbidden: str) -> set[str]:
    return {module for module in imports(path) if module.startswith(forbidden)}


def test_stages_import_library_and_standard_library_only():
    assert offenders(STAGES, lambda path: packages(path) - set(sys.stdlib_module_names) - {"mlxchat"}) == {}


def test_stages_import_no_stage_and_no_command():
    forbidden = ("mlxchat.stages", "mlxchat.commands", "mlxchat.cli", "mlxchat.composition.compose", "stages")
    assert offenders(STAGES, lambda path: beginning_with(path, *forbidden)) == {}


def test_only_the_loader_names_the_stages_package():
    naming = {name(path) for path in LIBRARY if "mlxchat.stages" in path.read_text(encoding="utf-8")}
    assert naming == {"src/mlxchat/runner/stage.py"}


def test_runner_imports_standard_library_only():
    # rich draws the bar on a terminal, psutil finds processes, filelock locks, submitit and ray run steps elsewhere.
    # Each is imported only there.
    own = set(sys.stdlib_module_names) | {"mlxchat"}
    assert (
        offenders(RUNNER, lambda path: packages(path) - own - {"rich", "psutil", "filelock", "submitit", "ray"}) == {}
    )
    assert offenders(RUNNER, lambda path: packages(path, everywhere=False) - own) == {}


def test_parts_import_no_part_above():
    order = {member: index for index, layer in enumerate(LAYERS) for member in layer}

    def above(path: Path) -> set[str]:
        part = path.relative_to(ROOT / "src" / "mlxchat").parts[0].removesuffix(".py")
        used = {module.split(".")[1] for module in imports(path) if module.startswith("mlxchat.")} & order.keys()
        used -= {"cpu"} if name(path) in MAY_IMPORT_CPU else set()
        return {other for other in used if order[other] > order[part]}

    parts = [path for path in LIBRARY if path.relative_to(ROOT / "src" / "mlxchat").parts[0] not in ROOTS]
    known = {path.relative_to(ROOT / "src" / "mlxchat").parts[0].removesuffix(".py") for path in parts}
    assert known - order.keys() == set(), "put them into LAYERS"
    assert offenders(parts, above) == {}


def test_package_root_has_only_startup_modules():
    names = {path.name for path in LIBRARY if path.parent.name == "mlxchat"}
    assert names == {"__init__.py", "__main__.py", "artifact.py", "cli.py", "errors.py", "pipeline.py"}


def test_runner_imports_neither_mlx_nor_numpy(tmp_path):
    modules = ", ".join(f"mlxchat.{path.parent.name}.{path.stem}" for path in RUNNER if path.stem != "__init__")
    code = f"import sys, {modules}, mlxchat.composition.compose\nprint(sorted({{'mlx', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_mlxchat_loads_the_blas_before_mlx(tmp_path):
    code = (
        "import mlxchat, sys; assert 'mlx' not in sys.modules; import mlx.core;"
        "from mlxchat.cpu import runtime; print(runtime.remedy())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "imported before mlxchat" not in done.stdout
    assert "not loaded yet" not in done.stdout
