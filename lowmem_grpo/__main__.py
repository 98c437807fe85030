"""`python -m lowmem_grpo`."""

from lowmem_grpo.cli import main

main()
