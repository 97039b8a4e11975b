// The page of a chat. It keeps the conversation, also over a reload; the server keeps the models and
// the rankings. A round is a question with its answers ("cards") and what the person marked.
"use strict";

let models = []; // what /api/about says
let rounds = []; // [{id, question, before, cards: [{model, text, notes}], marks}]
let cleared = null; // what "New" cleared
let number = 0; // of the next answer: it chooses the random numbers
let writing = null; // stops the answer that is being written
const rendered = new Map(); // text -> what the server made of it

// --- The server ---------------------------------------------------------------------------------

async function post(name, body, signal) {
  let answer;
  try {
    answer = await fetch(`api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw passing("The server does not answer. What you wrote is kept in this browser.");
  }
  if (answer.ok) return answer;
  const said = await answer.text();
  let message = said;
  try {
    message = JSON.parse(said).error;
  } catch {
    // the guard answers in plain text
  }
  throw answer.status === 503 ? passing(message) : new Error(message);
}

// an error that may be over in a moment
const passing = (message) => Object.assign(new Error(message), { passes: true });

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

async function render(texts) {
  const missing = [...new Set(texts)].filter((text) => !rendered.has(text));
  if (!missing.length) return;
  const found = await (await post("render", { texts: missing })).json();
  found.texts.forEach((one, i) => rendered.set(missing[i], one));
}

// --- Answers --------------------------------------------------------------------------------------

const bestOf = (round) => round.cards[round.marks.indexOf(Math.max(...round.marks))];

function historyAfter(round) {
  if (!round) return [];
  const best = bestOf(round);
  return best && best.text.trim() ? [...round.before, [round.question, best.text]] : round.before;
}

async function ask() {
  const question = $("question").value.trim();
  if (!question || writing) return;
  const id = crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;
  rounds.push({ id, question, before: historyAfter(rounds.at(-1)), cards: [], marks: [] });
  $("question").value = "";
  await answer(rounds.at(-1));
  if (!rounds.at(-1)?.cards.length) undo(); // the question goes back to where it was typed
}

async function answer(round) {
  const first = round.cards.length;
  const asked = models.map((_, model) => model).slice(0, 9 - first);
  for (const model of asked) {
    round.cards.push({ model, text: "", notes: [], writing: true });
    round.marks.push(0);
  }
  const cards = round.cards.slice(first);
  writing = new AbortController();
  banner("");
  draw();
  window.scrollTo(0, document.body.scrollHeight);
  try {
    const body = { question: round.question, before: round.before, models: asked, number: number++ };
    for await (const event of eventsOf(await post("ask", body, writing.signal))) take(event, cards);
    if (cards.some((card) => card.writing)) throw new Error("The answer broke off: the server ended.");
  } catch (error) {
    if (error.name !== "AbortError") banner(error instanceof TypeError ? "The answer broke off: the server ended." : error.message);
  }
  writing = null;
  cards.forEach((card) => delete card.writing);
  // nothing came at all: the cards go, unless the server said why
  const empty = cards.every((card) => !card.text && !card.notes.length);
  if (empty) round.cards.length = round.marks.length = first;
  remember();
  await drawRendered();
  $("said").textContent = empty ? "" : "The answer is complete";
}

function take(event, cards) {
  if (event.error) throw new Error(event.error);
  const card = cards.find((one) => one.model === event.model);
  if (!card) return banner(event.note);
  banner("");
  if (event.text) card.text += event.text;
  if (event.note) card.notes.push(event.note);
  if (event.done) {
    delete card.writing;
    if (event.cut) card.notes.push("cut off: response_length, or the end of the context");
    if (!card.text.trim() && !card.notes.length) card.notes.push("an empty answer");
  }
  const atEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
  drawCard(card);
  if (atEnd) window.scrollTo(0, document.body.scrollHeight);
}

// --- Marks ----------------------------------------------------------------------------------------

async function mark(round, card, value) {
  if (round.cards.some((one) => one.writing)) return;
  round.marks[card] = round.marks[card] === value ? 0 : value;
  round.unsaved = true;
  remember();
  await drawRendered();
  await save(round);
}

async function save(round) {
  const { id, question, before, marks } = round;
  const answers = round.cards.map(({ model, text }) => ({ model, text }));
  try {
    const found = await (await post("mark", { id, question, before, answers, marks })).json();
    saved(found.rows);
    round.kept = found.kept;
    delete round.unsaved;
    banner("");
  } catch (error) {
    banner(error.message);
    if (error.passes) setTimeout(saveMarks, 2000);
    else delete round.unsaved;
  }
  remember();
  draw();
}

// marks that the server did not get, because it had ended or its disk was full
async function saveMarks() {
  const round = rounds.find((one) => one.unsaved);
  if (!round) return;
  await save(round);
  if (!round.unsaved) await saveMarks();
}

function saved(rows) {
  $("saved").textContent = rows ? `${rows} ranking${rows > 1 ? "s" : ""} in ${$("saved").dataset.out}` : "";
}

// --- What is kept in this browser -------------------------------------------------------------------

function remember() {
  const draft = $("question").value;
  store((kept) => kept.setItem("rlhf-chat", JSON.stringify({ rounds, number, draft })));
}

function restore() {
  const kept = JSON.parse(store((one) => one.getItem("rlhf-chat")) || "null");
  if (!kept) return;
  ({ rounds, number } = kept);
  $("question").value = kept.draft;
  rounds = rounds.filter((round) => round.cards.every((card) => card.model < models.length));
  rounds.forEach((round) => round.cards.forEach((card) => delete card.writing));
}

function undo() {
  if (writing) return;
  if (!rounds.length && cleared) {
    rounds = cleared;
    cleared = null;
  } else if (rounds.length) {
    const { question } = rounds.pop();
    if (!$("question").value.trim()) $("question").value = question;
    $("question").focus();
  }
  remember();
  drawRendered();
}

function clear() {
  if (writing || !rounds.length) return;
  cleared = rounds;
  rounds = [];
  remember();
  draw();
  $("question").focus();
}

// --- Drawing --------------------------------------------------------------------------------------

async function drawRendered() {
  draw();
  try {
    await render(rounds.flatMap((round) => round.cards.filter((one) => !one.writing).map((one) => one.text)));
  } catch (error) {
    banner(error.message);
  }
  draw();
}

function draw() {
  const focused = document.activeElement?.dataset?.key;
  $("intro").hidden = rounds.length > 0;
  $("rounds").replaceChildren(...rounds.map(drawRound));
  $("send").hidden = Boolean(writing);
  $("stop").hidden = !writing;
  $("undo").disabled = Boolean(writing) || (!rounds.length && !cleared);
  $("new").disabled = Boolean(writing) || !rounds.length;
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
}

function drawRound(round, at) {
  const element = make("section", { className: "round" }, make("div", { className: "question", dir: "auto", textContent: round.question }));
  const list = make("ol", { className: "cards" });
  round.cards.forEach((card, place) => {
    card.element = make("li", { className: "card" });
    drawCard(card);
    if (!card.writing && card.text.trim()) card.element.append(drawFoot(round, place));
    if (round.cards.length > 1 && card === bestOf(round) && !writing) card.element.classList.add("best");
    list.append(card.element);
  });
  element.append(list);
  const marked = round.marks.some((one) => one);
  const says = [];
  if (marked && round.cards.length === 1) says.push("A ranking needs a second answer to this question.");
  else if (marked && round.kept === false) says.push("No ranking: the answers are equal, or marked as equal.");
  const last = at === rounds.length - 1 && !writing && round.cards.length < 9;
  if (last || says.length) {
    const after = make("div", { className: "after" });
    if (last && models.some((one) => one.varies)) {
      const label = models.length > 1 ? "Other answers" : "Another answer";
      const more = make("button", { textContent: label, title: "a", className: marked && round.cards.length === 1 ? "primary" : "" });
      more.id = "another";
      more.addEventListener("click", () => answer(round));
      after.append(more);
    }
    after.append(...says.map((text) => make("span", { className: "quiet", textContent: text })));
    element.append(after);
  }
  return element;
}

function drawCard(card) {
  const name = make("span", { className: "name quiet", textContent: models[card.model].name });
  const parts = [make("div", { className: "card-head" }, name)];
  const known = !card.writing && rendered.get(card.text);
  if (known && card.text.trim()) parts.push(textOf(known));
  else if (card.text.trim() || card.writing) {
    const text = make("pre", { className: "plain", dir: "auto", textContent: card.text });
    parts.push(make("div", { className: "text", dir: "auto" }, text));
  }
  parts.push(...card.notes.map((text) => make("p", { className: "note", textContent: text })));
  card.element.classList.toggle("writing", Boolean(card.writing));
  card.element.replaceChildren(...parts);
}

function drawFoot(round, place) {
  const alone = round.cards.length === 1;
  const buttons = [
    [1, alone ? "Good" : "Better", `${place + 1}`],
    [-1, alone ? "Bad" : "Worse", ""],
  ].map(([value, label, title]) => {
    const button = make("button", { textContent: label, title });
    button.setAttribute("aria-pressed", round.marks[place] === value);
    button.setAttribute("aria-label", `Answer ${place + 1}: ${label.toLowerCase()}`);
    button.dataset.key = `${round.id} ${place} ${value}`;
    button.addEventListener("click", () => mark(round, place, value));
    return button;
  });
  const foot = make("div", { className: "card-foot" }, ...buttons);
  if (!alone && round === rounds.at(-1) && round.cards[place] === bestOf(round)) {
    foot.append(make("span", { className: "quiet", textContent: "the conversation goes on from this one" }));
  }
  return foot;
}

// --- What people press ----------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("input", remember);
$("stop").addEventListener("click", () => writing?.abort());
$("new").addEventListener("click", clear);
$("undo").addEventListener("click", undo);
watchHeader(draw);

const keys = { a: "another", n: "new", u: "undo", p: "plain", "?": "help" };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const pressed = event.key;
  const last = rounds.at(-1);
  if (pressed === "Escape") {
    if (writing) writing.abort();
    else $("question").blur();
  } else if (event.target === $("question")) {
    if (pressed !== "Enter" || event.shiftKey || event.isComposing) return;
    ask();
  } else if (last && /^[1-9]$/.test(pressed) && pressed <= last.cards.length) {
    mark(last, Number(pressed) - 1, 1);
  } else if (last && pressed === "-") {
    mark(last, last.cards.length - 1, -1);
  } else if (keys[pressed]) {
    const button = $(keys[pressed]);
    if (button && !button.disabled) button.click();
  } else if (pressed === "/") {
    $("question").focus();
  } else return;
  event.preventDefault();
});

// --- The beginning --------------------------------------------------------------------------------

async function begin() {
  try {
    const found = await (await post("about", {})).json();
    models = found.models;
    $("saved").dataset.out = found.out;
    saved(found.rows);
  } catch (error) {
    banner(error.message);
    setTimeout(begin, 3000);
    return;
  }
  banner("");
  $("models").replaceChildren(
    ...models.map((one) => make("li", { textContent: one.about ? `${one.name} (continues text: ${one.about})` : one.name })),
  );
  $("how").textContent =
    models.length > 1
      ? "All of them answer. Mark the better answer: the conversation goes on from it, and a ranking is kept."
      : "Ask for another answer to a question and mark the better one: a ranking is kept.";
  restore();
  await drawRendered();
  saveMarks();
  $("question").focus();
}

begin();
