"""The rooms of the project and the arrows between them, read off the sources."""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {".h", ".cc", ".cu", ".cuh"}


def sources(room):
    files = [p for p in (ROOT / room).rglob("*") if p.suffix in SOURCES]
    assert files, f"{room} holds no sources"
    return files


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def offenders(room, is_bad):
    return [f"{p.relative_to(ROOT)}: {i}" for p in sources(room) for i in includes(p) if is_bad(i)]


def test_kernels_know_no_torch_and_no_python():
    bad = ("torch/", "ATen/", "c10/", "Python.h", "ops/", "lm/", "cli/")
    assert offenders("kernels", lambda i: i.startswith(bad)) == []


def functions_of_a_stream(paths, end):
    """{"name(type, type)"} of functions that take a Stream; parameters may have names or not."""
    found = set()
    for path in paths:
        text = re.sub(r"//.*", "", path.read_text())
        for name, parameters in re.findall(rf"^Status (\w+)\(([^()]*)\)\s*{end}", text, re.M):
            types = [re.sub(r" \w+$", "", " ".join(p.split())) for p in parameters.split(",")]
            if "Stream" in types:
                found.add(f"{name}({', '.join(types)})")
    return found


def test_a_build_without_cuda_has_every_function_of_a_stream():
    declared = functions_of_a_stream((ROOT / "kernels/include/parallax").glob("*.h"), ";")
    stood_for = functions_of_a_stream((ROOT / "kernels/no_cuda").glob("*.cc"), r"\{")
    assert "few_rows(const FewRowsProblem&, const FewRowsArgs&, const Device&, Stream)" in declared
    assert declared - stood_for == set()


def test_kernels_do_not_throw_print_or_exit():
    pattern = re.compile(r"\bthrow\b|\bprintf\(|\bstd::cout\b|\bstd::cerr\b|\bexit\(|\babort\(")
    found = []
    for path in sources("kernels"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if pattern.search(line.split("//")[0]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_ops_see_only_public_kernel_headers():
    public = {f"parallax/{p.name}" for p in (ROOT / "kernels/include/parallax").iterdir()}
    bad = offenders(
        "ops",
        lambda i: i.startswith(("lm/", "cli/", "kernels/"))
        or (i.startswith("parallax/") and i not in public),
    )
    assert bad == []


def test_lm_reaches_kernels_through_ops_alone():
    assert offenders("lm", lambda i: i.startswith(("parallax/", "kernels/", "cli/"))) == []
    allowed = {"ops/parallax_ops.h", "ops/step.h"}
    assert offenders("lm", lambda i: i.startswith("ops/") and i not in allowed) == []


def test_cli_sees_lm_alone():
    assert offenders("cli", lambda i: i.startswith(("parallax/", "kernels/", "ops/"))) == []


def test_no_environment_variable_is_read_below_the_command_line():
    for room in ("kernels", "ops", "lm"):
        found = [str(p.relative_to(ROOT)) for p in sources(room) if "getenv(" in p.read_text()]
        assert found == []


def documents():
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split()]


def test_paths_named_in_documents_exist():
    rooms = r"(?:kernels|ops|lm|cli|python|configs|tests|bench|docs|tools)"
    path = re.compile(rf"(?<![\w/.-])({rooms}/[\w./-]*[\w])")
    missing = []
    for document in documents():
        for name in path.findall(document.read_text()):
            if not (ROOT / name).exists() and not list(ROOT.glob(name + "*")):
                missing.append(f"{document.name}: {name}")
    assert missing == []


def test_promises_name_tests_that_exist():
    """docs/promises.md: files below tests/ and tools/, and tests as Suite.Name, Name or test_name."""
    files = [p for room in ("tests", "tools") for p in (ROOT / room).rglob("*") if p.is_file()]
    sources = "\n".join(p.read_text() for p in files if p.suffix in {".cc", ".py"})
    names = re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "promises.md").read_text())
    missing = []
    for name in names:
        if name.endswith((".cc", ".py", ".sh")):
            if not any(p.match(name) for p in files):
                missing.append(name)
        elif re.fullmatch(r"(\w+\.)?[A-Z]\w+|test_\w+", name):
            if not re.search(rf"\b{name.split('.')[-1]}\b", sources):
                missing.append(name)
    assert len(names) > 40 and missing == []
