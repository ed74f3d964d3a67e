
"use strict";
const shown = JSON.parse(document.getElementById("shown").textContent);
const find = id => document.getElementById(id);
const n = shown.pairs.length;
let votes = [], rater = "";

function show(id) {
  for (const part of ["start", "ask", "end"]) find(part).hidden = part !== id;
}

function next() {
  const i = votes.length;
  find("progress").value = i;
  if (i === n) { finish(); return; }
  find("count").textContent = `${i + 1} of ${n}`;
  find("caption").textContent = `\u201c${shown.captions[i]}\u201d`;
  shown.pairs[i].forEach((data, side) => { find("image" + (side + 1)).src = "data:image/png;base64," + data; });
  find("back").disabled = i === 0;
}

function vote(value) {
  if (find("ask").hidden) return;
  votes.push(value);
  next();
}

function back() {
  if (find("ask").hidden || !votes.length) return;
  votes.pop();
  next();
}

async function finish() {
  show("end");
  const text = JSON.stringify({ sheet: shown.sheet, rater: rater, votes: votes });
  const file = find("file");
  file.href = "data:application/json," + encodeURIComponent(text);
  file.download = `answers-${shown.sheet.slice(0, 8)}-${rater.replace(/[^A-Za-z0-9]+/g, "-")}.json`;
  const served = location.protocol === "http:";
  find("sendback").hidden = served;
  if (!served) { find("said").textContent = "Thank you."; return; }
  try {
    const reply = await fetch("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body: text });
    find("said").textContent = await reply.text();
    find("sendback").hidden = reply.ok;
  } catch (error) {
    find("said").textContent = "The answers could not be sent.";
    find("sendback").hidden = false;
  }
}

find("start").addEventListener("submit", event => {
  event.preventDefault();
  rater = find("name").value.trim();
  if (!rater) return;
  show("ask");
  next();
});
find("vote1").addEventListener("click", () => vote("1"));
find("vote2").addEventListener("click", () => vote("2"));
find("equal").addEventListener("click", () => vote("="));
find("back").addEventListener("click", back);
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || find("ask").hidden) return;
  const value = { "1": "1", "2": "2", "=": "=", "0": "=", "3": "=" }[event.key];
  if (value) { event.preventDefault(); vote(value); }
  if (event.key === "Backspace") { event.preventDefault(); back(); }
});
