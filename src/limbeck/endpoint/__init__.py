"""Language models behind an OpenAI-compatible HTTP interface: asked once per prompt, every answer kept in a checksummed log."""

from limbeck.endpoint.answers import Answer, TokenLog
from limbeck.endpoint.endpoint import Endpoint
from limbeck.endpoint.log import ResponseLog
from limbeck.endpoint.rationales import few_shot_prompt, parse_answer
from limbeck.endpoint.settings import Credentials, EndpointSettings, Estimate, Request

__all__ = [
    "Answer",
    "Credentials",
    "Endpoint",
    "EndpointSettings",
    "Estimate",
    "Request",
    "ResponseLog",
    "TokenLog",
    "few_shot_prompt",
    "parse_answer",
]
