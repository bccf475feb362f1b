// SPDX-License-Identifier: Apache-2.0
"use strict";
{
  const form = document.getElementById("filters");
  const sets = document.getElementById("f-set");
  const flips = document.getElementById("f-flips");
  const text = document.getElementById("f-text");
  const count = document.getElementById("f-count");
  const arms = [...form.querySelectorAll("input[name=arm]")];
  const control = arms.find((arm) => "control" in arm.dataset).value;

  const transcripts = [...document.querySelectorAll(".transcript")].map((node) => ({
    node,
    set: node.dataset.set,
    prompt: node.querySelector(".prompt").textContent.toLowerCase(),
    cards: [...node.querySelectorAll(".card")].map((card) => ({
      node: card,
      arm: card.dataset.arm,
      flips: card.dataset.flips ? card.dataset.flips.split(" ") : [],
      text: [...card.querySelectorAll(".answer")]
        .map((answer) => answer.textContent.toLowerCase())
        .join("\n"),
    })),
  }));

  const flipped = (card, wanted) =>
    wanted === "any" ? card.flips.length > 0 : card.flips.includes(wanted);

  // Under "only flips" the control's answer stays beside those that flipped.
  const apply = () => {
    const chosen = new Set(arms.filter((arm) => arm.checked).map((arm) => arm.value));
    const wanted = flips ? flips.value : "";
    const query = text.value.trim().toLowerCase();
    let shown = 0;
    for (const transcript of transcripts) {
      let any = false;
      let found = transcript.prompt.includes(query);
      for (const card of transcript.cards) {
        const matters = !wanted || flipped(card, wanted);
        const visible = chosen.has(card.arm) && (matters || card.arm === control);
        card.node.hidden = !visible;
        any ||= visible && matters;
        found ||= visible && card.text.includes(query);
      }
      const visible = any && found && (!sets.value || transcript.set === sets.value);
      transcript.node.hidden = !visible;
      shown += visible;
    }
    count.value = `${shown} of ${transcripts.length} prompts`;
  };

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}
