"""Pages that need no other file: no text of theirs is markup."""

import json
import re

from dllm_rl.cli.replay_page import document, page

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\u2028"


def test_page_keeps_text_out_of_its_markup():
    token = {"id": 1, "text": HOSTILE, "step": 0, "probability": 0.5}
    text = page({"facts": HOSTILE, "rows": [{"prompt": HOSTILE, "completion": HOSTILE, "tokens": [token]}]})
    assert text.count("<img") == 0 and text.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    assert json.loads(data)["groups"][0]["rows"][0]["tokens"][0]["text"] == HOSTILE
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page({"facts": "", "rows": []}))  # nothing is fetched


def test_marks_in_a_title_or_a_body_are_text():
    page = document("a @BODY@ @STYLE@ run", "<p>@SCRIPTS@ and @TITLE@</p>", groups=[], style="p { color: red; }")
    assert "<title>a @BODY@ @STYLE@ run</title>" in page and "<main>\n<p>@SCRIPTS@ and @TITLE@</p>\n</main>" in page
    assert page.count("color: red") == 1
