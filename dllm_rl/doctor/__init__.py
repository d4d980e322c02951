"""`dllm-rl doctor`: of a run or of rows, the cause of the mismatch; of a model, whether the library runs it right."""
