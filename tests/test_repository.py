"""The repository keeps its promises: pinned versions, two commands, nothing of one machine in
it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lenslab.files import REPOSITORY

TEXT = {".py", ".md", ".toml", ".txt", ".ipynb", ".json", ".jsonl", ".sh", ".yml", ".yaml", ""}
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([\w.]+)$")


def tracked() -> list[Path]:
    """Files git knows or would add; without git the test has nothing to judge."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of files")
    return [path for line in listed.stdout.splitlines() if (path := REPOSITORY / line).is_file()]


def texts() -> dict[str, str]:
    files = [f for f in tracked() if f.suffix in TEXT and f.stat().st_size < 3_000_000]
    return {
        str(f.relative_to(REPOSITORY)): f.read_text(encoding="utf-8", errors="replace")
        for f in files
    }


def pins(name: str) -> dict[str, str]:
    lines = [
        line
        for line in (REPOSITORY / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(PIN.match(line) for line in lines), [line for line in lines if not PIN.match(line)]
    return {re.sub(r"[-_.]+", "-", m.group(1)).lower(): m.group(2) for m in map(PIN.match, lines)}


def test_every_version_is_exact_and_none_is_local():
    requirements, constraints = pins("requirements.txt"), pins("constraints.txt")
    assert (
        "+"
        not in (REPOSITORY / "requirements.txt").read_text()
        + (REPOSITORY / "constraints.txt").read_text()
    )
    assert requirements["torch"] == "2.13.0"
    assert not set(requirements) & set(constraints)


def test_what_the_sources_import_is_in_the_requirements():
    own = {f.stem for f in (*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("tests/*.py"))} | {
        "lenslab"
    }
    names = {
        "sklearn": "scikit-learn",
        "umap": "umap-learn",
        "yaml": "pyyaml",
        "transformer_lens": "transformer-lens",
    }
    known = set(pins("requirements.txt"))
    for file in (f for f in tracked() if f.suffix == ".py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        found = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        found += [
            node.module
            for node in nodes
            if isinstance(node, ast.ImportFrom) and not node.level and node.module
        ]
        modules = {name.split(".")[0] for name in found} - own - set(sys.stdlib_module_names)
        siblings = {f.stem for f in file.parent.glob("*.py")}
        missing = {m for m in modules - siblings if names.get(m, m).replace("_", "-") not in known}
        missing -= {"IPython"}  # comes with every kernel; only asked whether there is one
        assert not missing, (
            f"{file.relative_to(REPOSITORY)} imports {missing}, which requirements.txt does not pin"
        )


def test_ci_runs_make_test_and_nothing_else():
    script = REPOSITORY / ".ci" / "run"
    lines = [
        line
        for line in script.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert lines[-1] == "exec make test"
    assert "set -euo pipefail" in lines
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("target", ["run", "test", "notebooks", "check-notebooks", "lint", "setup"])
def test_every_command_exists(target):
    made = subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_make_run_passes_the_model_and_the_notebooks_on_as_they_were_given():
    probe = 'include Makefile\nprobe:\n\t@printf \'%s|%s\' "$$MODEL" "$$NOTEBOOKS"\n'
    given = {"MODEL": "../a folder/it's $(here)", "NOTEBOOKS": "phase_1_loading phase_2"}
    words = [f"{key}={value.replace('$', '$$')}" for key, value in given.items()]
    made = subprocess.run(
        ["make", "-s", "-f", "-", "probe", *words],
        cwd=REPOSITORY,
        input=probe,
        capture_output=True,
        text=True,
    )
    assert made.stdout == f"{given['MODEL']}|{given['NOTEBOOKS']}", made.stderr


def test_a_python_that_is_too_old_is_named(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    stamp = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    made = subprocess.run(stamp, cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode != 0
    assert "3.11" in made.stdout + made.stderr
    assert not (tmp_path / "venv").exists()


def test_links_in_the_readme_resolve():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", readme) + re.findall(r'(?:src|href)="([^"#]+)"', readme)
    local = [
        target for target in targets if not target.startswith(("http://", "https://", "mailto:"))
    ]
    assert local
    assert not [target for target in local if not (REPOSITORY / target).exists()]


def test_commands_in_the_readme_exist():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = set(
        re.findall(
            r"\bmake ([a-z][\w-]*)", "\n".join(re.findall(r"```.*?```|`[^`]+`", readme, re.DOTALL))
        )
    )
    assert {"run", "test"} <= named <= targets
    scripts = re.findall(r"\b((?:scripts|benchmarks)/[\w/]+\.py)", readme)
    assert not [script for script in scripts if not (REPOSITORY / script).exists()]


def test_nothing_names_a_path_of_a_machine():
    homes = "|".join(
        ["work" + "/", "root" + "/", "opt/(?:wheels|pypi)", r"Users/[a-z]", r"tmp/[a-z_]+\.[$\d]"]
    )
    machine = re.compile(rf"(?<![\w.:/~])/(?:{homes})")
    own = str(REPOSITORY) + "/"
    found = {name: m.group() for name, text in texts().items() if (m := machine.search(text))}
    found |= {name: own for name, text in texts().items() if own in text and len(own) > 6}
    assert not found


def test_nothing_names_a_package_registry_of_ours():
    # The default registry needs no naming; a private one would break everybody else's set-up.
    option = re.compile(
        r"--(?:extra-)?index-url|--find-links|^\s*-[fi]\s+\S|--trusted-host", re.MULTILINE
    )
    names = ["requirements.txt", "constraints.txt", "Makefile", ".ci/run", "pyproject.toml"]
    assert not [name for name in names if option.search((REPOSITORY / name).read_text())]
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    hosts = set(re.findall(r"https?://(?:[^@/\s']*@)?([\w.-]+)", configured)) - {
        "pypi.org",
        "download.pytorch.org",
    }
    assert not [name for name, text in texts().items() if any(host in text for host in hosts)]


def test_the_files_together_are_small():
    files = tracked()
    assert sum(file.stat().st_size for file in files) < 150_000_000
    assert not [str(file) for file in files if file.suffix in {".pkl", ".pickle", ".pt", ".pth"}]


def test_licence_is_mit_of_the_lenslab_authors():
    text = (REPOSITORY / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "the lenslab authors" in text


FLOORS = (  # each may import those before it, and its own
    ("runtime", "files", "stats", "metrics"),
    ("smollm2",),
    ("texts", "opening", "loading", "models"),
    ("hooks", "tokens", "capture", "store", "records"),
    ("sae",),
    ("features", "circuits"),
    ("moe",),
    ("compare",),
    ("show",),
)


def test_no_module_imports_from_a_floor_above_it():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    package = REPOSITORY / "src" / "lenslab"
    found = {
        path.name.removesuffix(".py") for path in package.iterdir() if not path.name.startswith("_")
    }
    assert found - {"py.typed"} <= set(floor), "every module stands on a floor"
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "lenslab" and len(parts) > 1:
                    assert floor[parts[1]] <= floor[own], (
                        f"{file.name} imports {name}, a floor above it"
                    )
