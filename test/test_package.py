"""The package as pip and colcon install it: every way finds the same modules, data and programs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import speed3r_ros

ROOT = Path(__file__).parents[1]
PARTS = ("model", "kernels", "mapping", "training")
LOOK = """
import importlib, pathlib, sys
import speed3r_ros
for part in sys.argv[1:]:
    importlib.import_module(f"speed3r_ros.{part}")
from speed3r_ros.model import weights
here = pathlib.Path(speed3r_ros.__file__).parent
data = [p for name in ("weights", "resource") for p in (here / name).rglob("*") if p.is_file()]
compact = str(weights.locate("compact")) if any(p.suffix == ".safetensors" for p in data) else ""
print({"here": str(here), "compact": compact, "data": {str(p.relative_to(here)): p.stat().st_size for p in data}})
"""


def run(*command, cwd, **environment):
    """Standard output of a command that must succeed, without the variables that lead back to this checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")}
    done = subprocess.run(command, cwd=cwd, env=env | environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, links kept, without what builds and runs leave there."""
    copy = tmp_path_factory.mktemp("source") / "speed3r_ros"
    leave = shutil.ignore_patterns(".*", "build", "install", "log", "out", "runs", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)


def shipped(source):
    """Size of every file of package data, by its path in the package."""
    files = [*source.glob("weights/*.md"), *source.glob("weights/*/*.safetensors"), *source.glob("weights/*/*.md")]
    files += source.glob("resource/sample_bag/*")
    return {str(path.relative_to(source)): path.stat().st_size for path in files}


def check_installed(source, output, below):
    """The modules come from `below` and find all data that the repository ships."""
    found = ast.literal_eval(output.splitlines()[-1])
    assert Path(found["here"]).is_relative_to(below), found["here"]
    assert shipped(source).items() <= found["data"].items()
    if found["compact"]:
        assert Path(found["compact"]) == Path(found["here"]) / "weights" / "compact"


def check_share(source, prefix):
    share = prefix / "share" / "speed3r_ros"
    assert (prefix / "share/ament_index/resource_index/packages/speed3r_ros").is_file()
    files = [source / "package.xml", *source.glob("launch/*.launch.py"), *source.glob("config/*")]
    assert len(files) > 2
    for path in files:
        assert (share / path.relative_to(source)).read_bytes() == path.read_bytes()


def environment(folder):
    """Python of a new virtual environment that sees this one's packages, but not what is installed as editable here."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (folder / "lib" / version / "site-packages" / "parent.pth").write_text("\n".join(paths))
    return str(folder / "bin" / "python")


def pip_install(python, *what, cwd):
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--ignore-installed")
    run(*pip, "--no-build-isolation", *what, cwd=cwd)


def colcon(source, workspace, *options):
    """Build the workspace and return what LOOK prints in a shell that has sourced it."""
    pytest.importorskip("colcon_core", reason="waits for `pip install colcon-common-extensions`")
    (workspace / "src").mkdir()
    (workspace / "src" / "speed3r_ros").symlink_to(source)
    run(sys.executable, "-m", "colcon", "--log-base", "log", "build", *options, cwd=workspace)
    command = f'source install/setup.bash && cd / && "{sys.executable}" -c "$0" "$@"'
    return run("bash", "-c", command, LOOK, *PARTS, cwd=workspace)


def test_links_are_relative_and_stay_inside():
    links = {p.name: os.readlink(p) for p in (ROOT / "speed3r_ros").iterdir() if p.is_symlink()}
    assert links == {name: f"../{name}" for name in (*PARTS, "weights", "resource")}


def test_wheel(source, tmp_path):
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", cwd=source
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*\.", ".", top) for top in tops} == {"speed3r_ros", "speed3r_ros.dist-info", "speed3r_ros.data"}
    for part in PARTS:
        modules = {f"speed3r_ros/{part}/{p.name}" for p in (source / part).glob("*.py")}
        assert modules and modules <= set(names)

    python = environment(tmp_path / "venv")
    pip_install(python, str(wheel), cwd=tmp_path)
    check_installed(source, run(python, "-I", "-c", LOOK, *PARTS, cwd=tmp_path), tmp_path / "venv")
    check_share(source, tmp_path / "venv")
    assert {"speed3r", "recon_node"} <= {p.name for p in (tmp_path / "venv" / "bin").iterdir()}


def test_editable(source, tmp_path):
    python = environment(tmp_path / "venv")
    pip_install(python, "-e", str(source), cwd=tmp_path)
    check_installed(source, run(python, "-I", "-c", LOOK, *PARTS, cwd=tmp_path), source)


def test_colcon_build(source, tmp_path):
    check_installed(source, colcon(source, tmp_path), tmp_path / "install")
    prefix = tmp_path / "install" / "speed3r_ros"
    check_share(source, prefix)
    program = prefix / "lib" / "speed3r_ros" / "recon_node"
    assert program.read_text().startswith("#!/usr/bin/env python3\n"), (
        "the active virtual environment must run the node"
    )
    listed = "source install/setup.bash && echo $AMENT_PREFIX_PATH"
    assert str(prefix) in run("bash", "-c", listed, cwd=tmp_path).strip().split(":")


def test_colcon_symlink_install_is_live(source, tmp_path):
    own = shutil.copytree(source, tmp_path / "own", symlinks=True)
    check_installed(own, colcon(own, tmp_path, "--symlink-install"), tmp_path)
    check_share(own, tmp_path / "install" / "speed3r_ros")
    with open(own / "model" / "__init__.py", "a") as file:
        file.write("\nMARK = 7\n")
    command = 'source install/setup.bash && cd / && "$0" -c "import speed3r_ros.model as m; print(m.MARK)"'
    assert run("bash", "-c", command, sys.executable, cwd=tmp_path).strip() == "7"


def manifest():
    package = pytest.importorskip("catkin_pkg.package", reason="waits for `pip install catkin_pkg`")
    return package.parse_package(str(ROOT / "package.xml"), warnings=(warnings := [])), warnings


def test_manifest_is_valid():
    """colcon silently builds a package with an invalid manifest without its ament hooks."""
    parsed, warnings = manifest()
    assert warnings == []
    parsed.validate()
    assert (parsed.name, parsed.package_format, parsed.get_build_type()) == ("speed3r_ros", 3, "ament_python")
    assert all(re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-zA-Z]{2,}", person.email) for person in parsed.maintainers)
    assert parsed.maintainers and parsed.licenses == ["Apache-2.0"]


def test_versions_agree():
    setup = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text())[1]
    assert setup == manifest()[0].version == speed3r_ros.__version__


def imports(folder):
    """Top-level names of everything that the modules of a folder import."""
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"speed3r_ros", "__future__"}


def test_every_import_is_declared():
    """What the modules import is a rosdep key of the manifest or a requirement of setup.py."""
    parsed, _ = manifest()
    declared = {depend.name for depend in parsed.exec_depends}
    declared |= set(re.findall(r'"([A-Za-z][\w-]*)(?:[>\["])', (ROOT / "setup.py").read_text()))
    spelled = {
        "PIL": "pillow",
        "cv2": "python3-opencv",
        "yaml": "PyYAML",
        "mpl_toolkits": "matplotlib",
        "triton": "torch",
    }
    for folder in ("speed3r_ros", *PARTS):
        missing = {name for name in imports(ROOT / folder) if spelled.get(name, name) not in declared}
        assert not missing, f"{folder}/ imports {missing}, which neither package.xml nor setup.py declares"


def test_runtime_imports_are_in_the_manifest():
    parsed, _ = manifest()
    ros = {depend.name for depend in parsed.exec_depends}
    used = {name for name in imports(ROOT / "speed3r_ros") if name.endswith(("_msgs", "_srvs")) or name == "rclpy"}
    assert used <= ros
