// Questions about the chosen slide: the slide goes before the first question, later turns follow it.

import * as api from "./api.js";

export class Chat {
  // onQuestion: told of each question that is asked.
  constructor(onQuestion) {
    this.onQuestion = onQuestion;
    this.log = document.getElementById("log");
    this.form = document.getElementById("ask");
    this.question = document.getElementById("question");
    this.send = document.getElementById("send");
    this.stopButton = document.getElementById("stop");
    this.again = document.getElementById("new-chat");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.stopButton.addEventListener("click", () => this.flight?.abort());
    this.again.addEventListener("click", () => this.start(this.slide));
    this.start(null);
  }

  setModel(model) {
    this.model = model;
    document.getElementById("model").textContent = model ? model.split("/").pop() : "";
    this.update();
  }

  // A new conversation about a slide.
  start(slide) {
    this.flight?.abort();
    this.flight = null;
    this.slide = slide;
    this.turns = [];
    this.log.replaceChildren();
    this.update();
  }

  update() {
    const busy = this.flight != null;
    this.send.disabled = busy || !this.slide || !this.model;
    this.send.hidden = busy;
    this.stopButton.hidden = !busy;
    this.again.hidden = this.log.childElementCount === 0;
    this.log.setAttribute("aria-busy", busy);
  }

  messages() {
    return this.turns.map(({ role, text }, index) => {
      if (index > 0) return { role, content: text };
      const image = { type: "image_url", image_url: { url: this.slide } };
      return { role, content: [image, { type: "text", text }] };
    });
  }

  say(role, text) {
    const turn = document.createElement("p");
    turn.className = role;
    turn.textContent = text;
    this.log.append(turn);
    this.log.scrollTop = this.log.scrollHeight;
    return turn;
  }

  async submit() {
    const text = this.question.value.trim();
    if (!text || this.send.disabled) return;
    this.question.value = "";
    this.say("user", text);
    this.turns.push({ role: "user", text });
    this.onQuestion(text);
    const turn = this.say("assistant", "");
    turn.classList.add("waiting");
    const flight = (this.flight = new AbortController());
    this.update();
    let answer = "";
    try {
      for await (const part of api.streamed(this.messages(), this.model, flight.signal)) {
        const atEnd = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 24;
        answer += part;
        turn.classList.remove("waiting");
        turn.textContent = answer;
        if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      }
    } catch (error) {
      if (this.flight !== flight) return; // of a conversation that is over
      if (error.name === "AbortError") this.say("note", "Stopped.");
      else {
        this.say("error", error.message).setAttribute("role", "alert");
        if (!answer) this.question.value ||= text;
      }
    }
    if (this.flight !== flight) return;
    turn.classList.remove("waiting");
    if (answer) this.turns.push({ role: "assistant", text: answer });
    else {
      this.turns.pop();
      turn.remove();
    }
    this.flight = null;
    this.update();
  }
}
