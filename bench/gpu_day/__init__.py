"""Everything to learn from a GPU in a few minutes and without a network: `make gpu-day`.

It runs with the python3 that holds torch, makes no virtual environment and installs nothing. What happens, in order:

build       loads the libraries that were carried here, or compiles them for this card alone
look        two named cases of every operator, backend and dtype
tests       all of python_tests/gpu, a process for each operator and backend; one that breaks its CUDA context, crashes
            or hangs ends, and another one goes on behind the culprit
sanitizers  compute-sanitizer on a small call of every CUDA kernel, beside the tests
beyond      tensors of more than 2^31 elements, alone on the card
bench       benchmarks, alone on the card

Every result is a line of JSON in results.jsonl as soon as it is there, so that nothing is lost at a time limit; after
every step the page <card>.md is rendered from them (`python3 -m bench.gpu_day.summary results.jsonl` does it again).
`--rehearse` does all of it on the processor: the CUDA sources in the emulator, Triton's kernels in its interpreter, and
benchmarks of toy sizes whose times mean nothing.
"""
