"""An optimizer's state in parts, cut here by hand from one process's AdamW: put together, or refused by name."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_recipe import SIZES

from dllm_rl import tiny_masked_lm
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.optimizer_shards import Part, file_name, first_row, part_of, run_in_lockstep, write_part
from dllm_rl.distributed.sharding import shard
from dllm_rl.models.forward.blocks import blocks_of

SMALL = partial(tiny_masked_lm, **(SIZES | {"hidden_size": 8, "num_layers": 1, "intermediate_size": 8}))


@pytest.fixture
def trained():
    """A policy, and an AdamW that has made a step with it."""
    policy = SMALL()
    policy.weights_version = 1
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-3)
    for number, parameter in enumerate(policy.module.parameters()):
        parameter.grad = torch.linspace(-1, number + 1, parameter.numel()).view_as(parameter)
    optimizer.step()
    return policy, optimizer


def cut(folder, policy, optimizer, fractions=(0.0, 0.3, 0.3, 1.0)):
    """Files with the rows between these fractions of each tensor; the one between 0.3 and 0.3 has none."""
    for number, (low, high) in enumerate(pairwise(fractions)):
        tensors, rows = {}, {}
        for name, parameter in policy.module.named_parameters():
            for kind, value in optimizer.state[parameter].items():
                key = f"{kind} of {name}"
                if value.dim():
                    first, last = (int(fraction * len(value)) for fraction in (low, high))
                    tensors[key], rows[key] = value[first:last].clone(), [first, len(value)]
                elif number == 0:
                    tensors[key] = value
        path = folder / file_name(number, len(fractions) - 1)
        save_file(tensors, path, {"rows": json.dumps(rows), "plain": "{}"})


def load(folder):
    policy = SMALL()
    policy.weights_version = 1
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-3)
    checkpoint.load_optimizer(folder, policy, optimizer)
    return optimizer


def test_parts_are_put_together_bit_for_bit(tmp_path, trained):
    cut(tmp_path, *trained)
    found, own = load(tmp_path).state_dict()["state"], trained[1].state_dict()["state"]
    assert found.keys() == own.keys()
    for index, held in own.items():
        assert held.keys() == found[index].keys()
        assert all(torch.equal(held[kind], found[index][kind]) for kind in held)


def changed(folder, number, change):
    """Write a part again, changed: `change` takes its tensors and rows."""
    path = folder / file_name(number, 3)
    tensors = load_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    rows = json.loads(header["rows"])
    metadata = change(tensors, rows) or {"rows": json.dumps(rows), "plain": header["plain"]}
    save_file(tensors, path, metadata)


def key_of(rows):
    return next(key for key in sorted(rows) if key.startswith("exp_avg of") and "word_embeddings" in key)


def set_tensor(change):
    def changed(tensors, rows):
        tensors[key_of(rows)] = change(tensors[key_of(rows)]).contiguous()

    return changed


def unknown(tensors, rows):
    tensors["exp_avg of nothing"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            set_tensor(lambda x: x[:-1]),
            r"exp_avg of .*word_embeddings.weight' in .* the weight's shape",
        ),
        (set_tensor(lambda x: torch.cat([x, x])), "does not have the weight's shape"),
        (unknown, "'exp_avg of nothing' in the optimizer's state belongs to no trained weight"),
        (set_tensor(lambda x: x * float("nan")), "is not finite; resume from an earlier checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, trained, change, said):
    cut(tmp_path, *trained)
    changed(tmp_path, 2, change)
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_part_too_few_is_missed(tmp_path, trained):
    cut(tmp_path, *trained)
    (tmp_path / file_name(0, 3)).unlink()
    with pytest.raises(ValueError, match="does not have the weight's shape"):
        load(tmp_path)


@pytest.fixture
def alone():
    """A group of one process."""
    if dist.is_initialized():
        pytest.skip("another test's group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_part_that_is_written_during_the_next_step_is_of_the_step_before(alone):
    policy = SMALL()
    shard(policy.module, blocks_of(policy.module), Accelerator(cpu=True), size=1)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-3)
    for parameter in policy.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    part = part_of(policy, optimizer, copy=True)
    before = {key: value.clone() for key, value in part.tensors.items()}
    optimizer.step()
    after = part_of(policy, optimizer).tensors
    assert {key.partition(" of ")[0] for key in part.tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, before[key]) for key, value in part.tensors.items())
    assert not any(torch.equal(value, before[key]) for key, value in after.items())


def test_moments_of_no_weight_are_missed(tmp_path, trained):
    cut(tmp_path, *trained)
    for number in range(3):
        changed(tmp_path, number, lambda tensors, rows: (tensors.clear(), rows.clear(), None)[2])
    with pytest.raises(ValueError, match=r"optimizer-0000\d-of-00003.safetensors holds no moments of .* after 1 upd"):
        load(tmp_path)


def test_a_part_that_cannot_be_written_says_which(tmp_path):
    with pytest.raises(OSError, match=r"optimizer-00002-of-00003\.safetensors was not saved: ") as caught:
        write_part(tmp_path / "gone", Part(1, 3))
    assert caught.value.strerror


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_are_divided_as_torch_divides_them(length, count):
    chunks = [chunk.tolist() for chunk in torch.arange(length).chunk(count)]
    parts = [list(range(first_row(length, n, count), first_row(length, n + 1, count))) for n in range(count)]
    assert parts == chunks + [[]] * (count - len(chunks))


class TestInStep:
    """Three processes as threads, whose exchange is a barrier."""

    @staticmethod
    def all_of(works):
        import threading

        said, barrier, ends = [None] * len(works), threading.Barrier(len(works), timeout=600), [None] * len(works)

        def gather(place, value):
            said[place] = value
            barrier.wait()
            found = list(said)
            barrier.wait()
            return found

        def run(place):
            try:
                ends[place] = run_in_lockstep(works[place], partial(gather, place))
            except (ValueError, OSError) as error:
                ends[place] = error

        threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends

    def test_all_hear_what_each_says(self):
        works = [lambda swap, own=own: swap(own) + swap(own * 2) for own in (1, 2, 3)]
        assert self.all_of(works) == [[1, 2, 3, 2, 4, 6]] * 3

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_an_error_of_one_ends_all_with_it(self, after):
        def fails(swap):
            for _ in range(after):
                swap(None)
            raise OSError("the disk is full")

        def goes_on(swap):
            swap(None)
            swap(None)

        ends = self.all_of([goes_on, fails, goes_on])
        assert [str(end) for end in ends] == ["the disk is full"] * 3
