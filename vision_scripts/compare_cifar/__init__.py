"""The study on CIFAR-10: the library's default against HAP's and EHAP's recipes, Torch-Pruning and simple scores.

    python -m vision_scripts.compare_cifar --data_dir ../shared/cifar10 --dense_dir ../shared/cifar10/dense

A cell is a network, a method, a ratio and a seed of the sample of training images, and says what is left of accuracy
after surgery, after the refit and after recovery. Each is a line of `benchmarks/cifar.jsonl`; a cell that is there is
not run again, so a run that was killed goes on by the same command. Seconds are the processor's.
`python -m docs.render_results` writes the table and the plot.
"""
