"""`python -m dllm_rl.cli` is `dllm-rl`."""

from dllm_rl.cli.main import main

raise SystemExit(main())
