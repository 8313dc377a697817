"""Entry point of `python -m lp_dist.finetune`, under any launcher: the training program."""

from lp_dist.training.finetune import main

if __name__ == "__main__":
    main()
