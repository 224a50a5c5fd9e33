"""Rows of the results files, and the conditions under which they were measured."""

import contextlib
import json
import statistics
import subprocess
import threading

import torch

CONDITIONS = {"sm_clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}  # as sampled: name, unit


def row(section, name, shape, precision="highest", dtype="float32", **values):
    """One object of a results file. Every row has these keys; what does not apply is null."""
    keys = ["kernel", "ms", "p10", "p90", "speedup", "error_frobenius", "error_componentwise"]
    return {
        "section": section,
        "name": name,
        "precision": precision,
        "dtype": dtype,
        "shape": list(shape),
        **dict.fromkeys(keys),
        **values,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
    }


def save(path, rows):
    """A line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


@contextlib.contextmanager
def sampled_conditions():
    """A list that nvidia-smi fills, five times a second, with (SM clock in MHz, power in W, temperature in °C).

    Empty where nvidia-smi is missing or does not know these: the times stand without it.
    """
    samples, device = [], f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", device, query, "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield samples
        return

    def read():
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a heading, or [N/A]
                sm_clock, power, temperature = map(float, line.split(","))
                samples.append((sm_clock, power, temperature))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.kill()
        reader.join(timeout=5)
        process.wait()


def conditions_row(samples, name, precision=None, **values):
    """A row of section 'conditions': {median, min, max} of what was sampled while the section of that name was
    measured, or null, and what else is given.
    """
    for key, column in zip(CONDITIONS, zip(*samples)):
        values[key] = {"median": statistics.median(column), "min": min(column), "max": max(column)}
    return row("conditions", name, (), precision, None, **(dict.fromkeys(CONDITIONS) | values))


def described_conditions(conditions):
    """One line of a row of section 'conditions'."""
    sampled = [(unit, conditions[key]) for key, unit in CONDITIONS.items() if conditions[key]]
    texts = [f"{of['median']:g} {unit} ({of['min']:g} to {of['max']:g})" for unit, of in sampled]
    return "median (min to max): " + ", ".join(texts) if texts else "conditions not sampled"
