// Conversations in which a person plays both sides. A draft is kept by the browser until it is saved.
"use strict";

const DRAFT = "rlhf-rank conversation";
const turns = () => [...$("turns").querySelectorAll("textarea")].map((one) => one.value);

function drawTurns(texts) {
  const speakers = ["User", "Assistant"];
  $("turns").replaceChildren(
    ...texts.map((text, i) => {
      const label = make("label", { textContent: speakers[i % 2] });
      label.append(make("textarea", { value: text, rows: i % 2 ? 5 : 2, dir: "auto" }));
      return label;
    }),
  );
  keepTurns();
}

function keepTurns() {
  store((kept) => kept.setItem(DRAFT, JSON.stringify(turns())));
  $("save").disabled = !turns().every((text) => text.trim());
  $("fewer").disabled = turns().length <= 2;
}

$("write").addEventListener("click", () => {
  drawTurns(JSON.parse(store((kept) => kept.getItem(DRAFT)) || '["", ""]'));
  $("write-dialog").showModal();
});
$("turns").addEventListener("input", keepTurns);
$("more").addEventListener("click", () => {
  drawTurns([...turns(), "", ""]);
  $("turns").lastChild.previousSibling.firstElementChild.focus();
});
$("fewer").addEventListener("click", () => drawTurns(turns().slice(0, -2)));
$("save").addEventListener("click", async () => {
  const messages = turns().map((content, i) => ({ role: i % 2 ? "assistant" : "user", content }));
  const token = crypto.getRandomValues(new Uint32Array(4)).join("-"); // a repeated try saves it once
  $("save").disabled = true;
  if (await ask("write", { token, messages })) {
    drawTurns(["", ""]);
    $("write-dialog").close();
    banner("The conversation is saved.");
    setTimeout(() => banner(""), RETRY);
  } else keepTurns();
});
