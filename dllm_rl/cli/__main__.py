"""Run `dllm-rl` as `python -m dllm_rl.cli`."""

from dllm_rl.cli.main import main

raise SystemExit(main())
