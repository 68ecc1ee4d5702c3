"""What an argument may be: each turns its text into a value, or says what is wrong with it."""

import argparse
import sys


def address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.168.1.20:7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def addresses(text: str) -> tuple[tuple[str, int], ...]:
    return tuple(address(part.strip()) for part in text.split(","))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


def wholes(text: str) -> tuple[int, ...]:
    return tuple(whole(part.strip()) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} holds an empty name")
    return found


def number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # false for nan
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def non_negative(text: str) -> float:
    return number(text, 0.0, sys.float_info.max, "a number from 0 up")


def fraction(text: str) -> float:
    return number(text, 0.0, 1.0, "a number from 0 to 1")


def factor(text: str) -> float:
    return number(text, sys.float_info.min, sys.float_info.max, "a number above 0")


def seconds(text: str) -> float:
    return number(text, 0.01, 3600.0, "a number of seconds from 0.01 up")
