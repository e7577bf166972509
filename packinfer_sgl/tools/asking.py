"""Questions to a running server, and the one line that says why there is no answer."""

from __future__ import annotations

import requests


class CommandError(Exception):
    """A command failed; the text is the one line that the user reads."""


def active_states(url: str, api_key: str | None = None) -> list[dict]:
    """``server_states``; raises CommandError if packinfer is not active in one of them, too."""
    states = server_states(url, api_key)
    for state in states:
        if not state["active"]:
            raise CommandError(f"packinfer is not active at {url}: {state['reason']}")
    return states


def server_states(url: str, api_key: str | None = None) -> list[dict]:
    """What packinfer reports of itself in a running server, one dict per data-parallel rank.

    Raises CommandError if the server does not answer or does not have packinfer.
    """
    info = server_info(url, api_key)
    states = [rank["packinfer"] for rank in info["internal_states"] if "packinfer" in rank]
    if not states:
        raise CommandError(f"packinfer-sgl is not installed in the server at {url}")
    return states


def server_info(url: str, api_key: str | None = None) -> dict:
    """What an SGLang server says of itself. Raises CommandError if it does not answer, or is none."""
    answer = ask(url, "/server_info", api_key)
    try:
        info = answer.json()
        info["internal_states"][0].keys()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CommandError(f"{url} is no SGLang server: /server_info answers {answer.status_code}") from None
    return info


def ask(url: str, path: str, api_key: str | None = None) -> requests.Response:
    """The answer to a GET. Raises CommandError if there is none, or the server wants another key."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = requests.get(f"{url.rstrip('/')}{path}", headers=headers, timeout=10)
    except requests.ConnectionError:
        raise CommandError(f"no server answers at {url}") from None
    except requests.Timeout:
        raise CommandError(f"the server at {url} does not answer within 10 s") from None
    except requests.RequestException as e:
        raise CommandError(f"{url} cannot be asked: {e}") from None
    if answer.status_code == 401:
        raise CommandError(f"{url} refuses the key; give its --api-key with --api-key")
    return answer
