"""Loads the compiled half of vLLM, which `import vllm` does without, and fails with the reason if that is not possible.

.venv/bin/python requirements/check_engine.py cpu|gpu
"""

import sys

from policies.vllm_settings import MissingError, check_compiler, prepare_cpu


def main(engine: str) -> None:
    """Checks the engine, and ends with a line that says what to do where it cannot work."""
    if engine == "gpu":
        try:
            check_compiler()
        except MissingError as error:
            print(f"note: serving.compile cannot be used here: {error}")
        return
    try:
        prepare_cpu()
    except MissingError as error:
        sys.exit(f"error: {error}")
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "init_cpu_memory_env"):
        sys.exit("error: vLLM's extension cannot be loaded; the warning above says why")


if __name__ == "__main__":
    main(sys.argv[1])
