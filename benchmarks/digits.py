"""Trains the digits networks with the host's neurons, with ours and with coupled nodes.

Run ``python benchmarks/digits.py``. It prints the accuracy on the test set after some epochs (the
median over seeds, the smallest and the largest), the memory of one training step in live tensors,
and the median time of training steps that alternate between the neurons.
"""

from __future__ import annotations

import argparse
import statistics

from snn_revplugin.cli.comparison import Setup, versions
from snn_revplugin.cli.demo import accuracy_of, train
from snn_revplugin.cli.workloads import COUPLED, HOST, OURS, WORKLOADS, Batch, digits
from snn_revplugin.report.memory import memory_report, mib

NETS = ("digits-snntorch", "digits-spikingjelly")
SIDES = (HOST, OURS, COUPLED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings per neuron")
    options = parser.parse_args()
    print(
        ", ".join(f"{name} {version}" for name, version in versions().items() if version),
        end="\n\n",
    )
    print(
        "| network | neuron | accuracy | retained | peak | step |\n| --- | --- | --- | --- | --- |"
        " --- |",
        flush=True,
    )
    for name in NETS:
        accuracies, milliseconds = {whose: [] for whose in SIDES}, {whose: [] for whose in SIDES}
        for seed in range(options.seeds):
            setup = Setup.usual(WORKLOADS[name], seed=seed)
            training, test = digits(setup.workload.image[-1])
            nets, taken = train(setup, training, options.epochs, sides=SIDES)
            for whose in SIDES:
                accuracies[whose].append(100 * accuracy_of(setup, nets[whose], test))
                milliseconds[whose].append(taken[whose])
        batch = Batch(training.images[: setup.batch], training.classes[: setup.batch])
        for whose in SIDES:
            net = setup.net(whose)
            memory = memory_report(lambda net=net, batch=batch, setup=setup: setup.loss(net, batch))
            of = accuracies[whose]
            cells = (
                f"{name}, T {setup.time_steps}" if whose == HOST else "",
                setup.workload.neuron(whose).__name__,
                f"{statistics.median(of):.1f}% ({min(of):.1f} to {max(of):.1f})",
                mib(memory.retained),
                mib(memory.peak),
                f"{statistics.median(milliseconds[whose]):.0f} ms",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
