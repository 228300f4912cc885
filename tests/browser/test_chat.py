"""What a person sees in the browser. This catches what the API can't: the browser adds built-in tools to each chat."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from playwright.sync_api import Page, expect

if TYPE_CHECKING:
    from conftest import Account, Ui

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER_TIMEOUT_MS = 120_000


def sign_in(page: Page, ui: Ui, account: Account) -> None:
    """Come to the page where a chat begins."""
    page.goto(ui.url)
    page.get_by_label("Email").fill(account.email)
    page.locator("input[type=password]").fill(account.password)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.locator("#chat-input")).to_be_visible()


def test_an_ordinary_user_gets_the_models_own_answer(page: Page, ui: Ui, account: Account) -> None:
    sign_in(page, ui, account)
    page.get_by_role("button", name=re.compile("^Select(ed| a) model")).click()
    page.get_by_role("option", name=account.model).click()
    expect(page.get_by_role("button", name=f"Selected model: {account.model}")).to_be_visible()

    page.locator("#chat-input").click()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")

    answer = page.locator(".chat-assistant").last
    # The button comes when the answer is complete; a refused request shows its reason instead.
    expect(page.locator(".copy-response-button").last).to_be_visible(timeout=ANSWER_TIMEOUT_MS)
    expect(answer).to_contain_text(os.environ.get("SELFHOST_UI_EXPECTED", "Paris"))
    expect(page.locator(".chat-user")).to_contain_text(QUESTION)


def test_a_stranger_finds_no_way_to_sign_up(page: Page, ui: Ui) -> None:
    page.goto(ui.url)
    expect(page.get_by_role("button", name="Sign in", exact=True)).to_be_visible()
    expect(page.get_by_text("Sign up")).to_have_count(0)
