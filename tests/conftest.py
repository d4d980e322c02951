"""One thread a test process, of which pytest-xdist runs one a core: small tensors gain nothing from more threads, and
sums come out the same everywhere. And the CPU on every machine, so that the numbers are the same ones: `pytest -m gpu`
runs what is for a GPU, on the GPU."""

import gc
import os
from collections import defaultdict

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="of torch, in a test process")
    parser.addoption("--other-cpu", action="store_true", help="matrix products round by their number of rows")


def leave_records_to_their_constructor():
    """--jaxtyping-packages checks calls of every dataclass; a record's constructor also takes what it converts."""
    import jaxtyping

    checked = jaxtyping.jaxtyped

    def unless_record(of=None, /, **options):
        if of is None:
            return lambda each: unless_record(each, **options)
        is_record = isinstance(of, type) and any(base.__name__ == "Record" for base in of.__mro__)
        return of if is_record else checked(of, **options)

    jaxtyping.jaxtyped = unless_record


def pytest_configure(config):
    if config.getoption("--jaxtyping-packages", None):
        leave_records_to_their_constructor()
    if config.getoption("threads") > 1:  # threads that wait leave the cores to those that compute; workers inherit it
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(config.getoption("threads"))
    if config.getoption("other_cpu"):
        from other_cpu import OtherCPU

        OtherCPU().__enter__()  # for the whole process: fixtures are computed under it too
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays. The garbage collector would look through it 25 times, a third of the time
    of the collection, and as often later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)  # by default 700 new objects start a collection
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Runs leave an empty training.png, as drawing takes longer than a tiny run. A test that wants a picture takes the
    fixture `pictures`, or calls the `plot` that it has imported."""
    from dllm_rl.files import replacing
    from dllm_rl.monitoring import plots

    def empty(directory, **_):
        with replacing(directory / "training.png") as partial:
            partial.touch()
        return directory / "training.png"

    drawn = plots.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot", empty)
        yield drawn


@pytest.fixture
def pictures(no_pictures, monkeypatch):
    monkeypatch.setattr("dllm_rl.monitoring.plots.plot", no_pictures)


OF_CHECKS = ("tests/models/test_policy.py", "tests/models/test_outside.py", "tests/models/test_bad_policies.py")
OF_CHECKS += ("tests/models/checkpoint/test_families_errors.py", "tests/testing/")


@pytest.fixture(scope="session", autouse=True)
def checks_of_models():
    """Whether attention and logits are those of a stock class is checked once for each architecture: the check takes
    half of the time that it takes to make a tiny model. Files that hold the checks check every one."""
    from dllm_rl.models import policy as policies

    passed = set()

    def once(check):
        def checked(policy):
            module, test = policy.module, os.environ.get("PYTEST_CURRENT_TEST", "")
            is_stock = type(module).__module__.startswith("transformers.")
            if not is_stock or test.startswith(OF_CHECKS):
                return check(policy)
            key = (check, policy.spec, policy.pad_id, str(module.config.to_dict()), *map(type, module.modules()))
            if key not in passed:
                check(policy)
            passed.add(key)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        for name in ("check_attention", "check_logits"):
            patch.setattr(policies, name, once(getattr(policies, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """What tests write need not outlive a power cut, for which a tiny run would wait half of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def no_rehearsal(request, monkeypatch):
    """Runs begin without the rehearsal, which takes a third of a tiny run: for files about what comes after it."""
    if "rehearsal" not in request.fixturenames:
        monkeypatch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)


@pytest.fixture
def rehearsal():
    """A test of such a file that is about the rehearsal, too."""


@pytest.fixture
def exact_arithmetic():
    """The arithmetic of `zero_mismatch`, in which a row rounds alike in every batch on every processor. A test takes it
    where bits must agree between forwards of other rows; without it they agree to rounding alone."""
    from dllm_rl.models.forward.batch_invariance import batch_invariant

    with batch_invariant():
        yield


# Documents: CI runs these beside the default suite. Studies and benchmarks: `make nightly`. Of recipes/ some tests hold
# the library.
DOCUMENTS = ("tests/test_doc", "tests/test_page_tables.py")
STUDIES = ("tests/recipes/", "tests/benchmarks/")
OF_LIBRARY = ("defaults", "enumeration", "exactness", "launches", "one_file", "quantized_sudoku")
OF_LIBRARY += ("surrogates", "trees", "turns")


def leave_repetitions(items):
    """Mark as slow what a test marked `repeated` says once more."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("repeated") and not any(map(item.get_closest_marker, ("slow", "nightly"))):
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        asked = same[0].get_closest_marker("repeated").kwargs
        kept = same[:1] if asked.get("first_only") else same[:: asked.get("every", max(1, len(same) - 1))]
        for item in same:
            if item not in kept:
                item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    from dllm_rl.quantization.schemes import has_float8_rows

    leave_repetitions(items)
    for item in items:
        if " at 0x" in item.nodeid:  # workers would collect tests of different names
            raise pytest.UsageError(f"{item.nodeid}: an address differs from process to process; give ids")
        if item.nodeid.startswith(DOCUMENTS) and not item.get_closest_marker("nightly"):
            item.add_marker("slow")
        if item.nodeid.startswith(STUDIES) and item.path.stem.removeprefix("test_") not in OF_LIBRARY:
            item.add_marker("nightly")
        if config.getoption("other_cpu") and "tests/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="the simulated GPU rounds as this CPU does"))
        scheme = "float8dynamicemulated" in item.nodeid.replace("_", "").lower()  # a class, or a test's own name for it
        if scheme or item.get_closest_marker("float8_rows"):
            why = "this torch has no float8 products with a scale a row on this CPU"
            item.add_marker(pytest.mark.skipif(not has_float8_rows(), reason=why))
