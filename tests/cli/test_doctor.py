"""What `dllm-rl doctor` asks of the checkpoint that it opens."""

import pytest

from dllm_rl.cli import doctor
from dllm_rl.cli.main import main


@pytest.mark.parametrize(("flags", "float32_head"), [([], True), (["--half_head"], False)])
def test_the_head_is_in_fp32_unless_told_otherwise(monkeypatch, flags, float32_head):
    seen = []

    def opened(arguments, **options):
        seen.append(options)
        raise ValueError("this is enough")

    monkeypatch.setattr(doctor, "open_policy", opened)
    assert main(["doctor", "folder", "--quantization", "none", *flags]) == 2
    assert seen == [{"float32_head": float32_head}]
