"""The web page of the server, to try a model in a browser. It contacts no other host, and never renders model text as
HTML.
"""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>dllm-rl serve</title>
<style>
body { font: 16px sans-serif; max-width: 48em; margin: 2em auto; padding: 0 1em }
textarea { width: 100%; height: 6em; font: inherit }
#answer { white-space: pre-wrap; border: 1px solid gray; padding: 0.5em; min-height: 3em }
</style>
<h1>dllm-rl serve</h1>
<form id="form">
<p><textarea id="prompt" placeholder="prompt" required></textarea>
<p><label><input type="checkbox" id="chat"> as a chat message</label>
<label>tokens <input type="number" id="tokens" min="1" placeholder="default"></label>
<label>temperature <input type="number" id="temperature" min="0" max="2" step="0.1" placeholder="default"></label>
<label>token <input type="password" id="token" placeholder="none"></label>
<button>Complete</button>
</form>
<p id="answer"></p>
<p id="facts"></p>
<script>
const at = id => document.getElementById(id);
at("form").onsubmit = async event => {
  event.preventDefault();
  at("answer").textContent = "...";
  at("facts").textContent = "";
  const text = at("prompt").value, chat = at("chat").checked;
  const body = chat ? {messages: [{role: "user", content: text}]} : {prompt: text, logprobs: 0};
  if (at("tokens").value) body.max_tokens = Number(at("tokens").value);
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  const headers = {"Content-Type": "application/json"};
  if (at("token").value) headers.Authorization = "Bearer " + at("token").value;
  try {
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    const response = await fetch(path, {method: "POST", headers, body: JSON.stringify(body)});
    const answer = await response.json();
    if (answer.error) throw new Error(answer.error.message);
    const choice = answer.choices[0];
    at("answer").textContent = chat ? choice.message.content : choice.text;
    at("facts").textContent = answer.usage.completion_tokens + " tokens, " + choice.finish_reason + ", " +
      answer.system_fingerprint;
  } catch (error) { at("answer").textContent = error.message; }
};
</script>
"""
