"""Configurations of every family, by "family: what is special"; each file holds some families."""

from . import (
    cases_alibi,
    cases_classic,
    cases_deep,
    cases_gemma,
    cases_gemma4,
    cases_images,
    cases_llama,
    cases_llamas,
    cases_moe,
    cases_olmo,
)
from .peer import Case

CASES: dict[str, Case] = {
    **cases_alibi.CASES,
    **cases_classic.CASES,
    **cases_deep.CASES,
    **cases_gemma.CASES,
    **cases_gemma4.CASES,
    **cases_images.CASES,
    **cases_llama.CASES,
    **cases_llamas.CASES,
    **cases_moe.CASES,
    **cases_olmo.CASES,
}
