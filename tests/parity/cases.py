"""Configurations of every family, by "family: what is special"; each file holds some families."""

from . import cases_gemma, cases_llama, cases_moe
from .peer import Case

CASES: dict[str, Case] = {**cases_llama.CASES, **cases_gemma.CASES, **cases_moe.CASES}
