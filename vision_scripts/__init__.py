"""The main job for image classifiers, and the CIFAR networks of the HAP and EHAP papers."""
