// One answer on the page: its text as it streams in, and its figures (tokens, loops, speed, size of the KV cache).

import { get, stream } from "./api.js";

const KV_EVERY = 500; // milliseconds between two requests for the size of the KV cache

const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, count)) / 10));
  const value = count / 1024 ** power;
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
};

const duration = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

const times = (ratio) => `${ratio >= 10 ? Math.round(ratio) : ratio.toFixed(1)}x`;

export class Answer {
  // given: the text that the model continues, shown before the answer; null in a chat.
  // most: the most loops of a token, where each leaves the loop by itself.
  constructor(title, loops, given, most) {
    this.element = document.getElementById("answer").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h3").textContent = title;
    this.loops = loops;
    this.most = most;
    this.told = { tokens: 0, loops: 0 }; // by the usage of the last chunk
    this.text = "";
    this.output = document.createElement("span");
    this.unseen = document.createDocumentFragment(); // text that comes on the screen with the next frame
    const place = this.element.querySelector(".text");
    if (given) {
      const before = document.createElement("span");
      before.className = "given";
      before.textContent = given;
      place.append(before);
    }
    place.append(this.output);
    this.asked = -Infinity; // when the size of the KV cache was last asked for
  }

  // Streams the answer until it has ended or is stopped; throws when it failed.
  // grown: called whenever the answer has become longer on the screen.
  async run(path, body, signal, grown) {
    const begun = performance.now();
    let first = 0;
    this.element.classList.add("running");
    this.element.setAttribute("aria-busy", "true"); // so that screen readers read the answer as a whole
    try {
      for await (const chunk of stream(path, { ...body, num_loops: this.loops }, signal)) {
        const now = performance.now();
        const choice = chunk.choices[0];
        const text = choice?.text ?? choice?.delta?.content ?? "";
        if (choice && !first) {
          first = now;
          this.atFirst = chunk.usage?.completion_tokens; // more than one, where the first ones have no text or came together
          this.figure("first", duration(first - begun));
        }
        if (text) {
          this.text += text;
          this.unseen.append(this.warm(text, chunk.usage)); // as a text node, so that what a model writes is never markup
          this.frame ??= requestAnimationFrame(() => this.show(grown));
        }
        if (chunk.usage) this.count(chunk.usage, first, now, !choice);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      this.fail(error.message);
      throw error;
    } finally {
      this.element.classList.remove("running");
      this.element.setAttribute("aria-busy", "false");
      this.show(grown);
    }
  }

  // Puts on the screen what has come. Once a frame and not with each token: the browser lays out all of a text for that.
  show(grown) {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    this.output.append(this.unseen);
    this.output.normalize();
    grown();
  }

  // New text, the darker the more loops its tokens have run where each leaves the loop by itself.
  warm(text, usage) {
    if (this.loops !== "auto" || !usage) return text;
    const tokens = usage.completion_tokens;
    const loops = Math.round(tokens * (usage.completion_tokens_details.mean_loops ?? 0));
    const mean = (loops - this.told.loops) / (tokens - this.told.tokens);
    this.told = { tokens, loops };
    if (!Number.isFinite(mean)) return text;
    const shown = document.createElement("span");
    shown.className = "warm";
    shown.style.setProperty("--heat", (mean - 1) / (this.most - 1));
    shown.title = `${mean.toFixed(1)} of ${this.most} loops`;
    shown.append(text);
    return shown;
  }

  // Shows the figures that follow from the token counts. The last chunk brings the counts alone, without a token, so its
  // time says nothing of the speed.
  count(usage, first, now, last) {
    this.figure("tokens", usage.completion_tokens);
    const loops = usage.completion_tokens_details.mean_loops;
    if (loops !== null) this.figure("loops", loops.toFixed(2));
    const later = usage.completion_tokens - this.atFirst;
    if (later > 0 && now > first && !last) this.figure("rate", (later / ((now - first) / 1000)).toFixed(1));
    if (last || now - this.asked > KV_EVERY) {
      this.asked = now;
      this.showCache(usage.total_tokens, now);
    }
  }

  async showCache(tokens, asked) {
    let found;
    try {
      found = await get(`/kv?tokens=${tokens}${this.loops === "auto" ? "" : `&num_loops=${this.loops}`}`);
    } catch {
      return; // the figure stays as it was, and is asked for again with the next tokens
    }
    if (asked !== this.asked) return; // a newer answer is on its way, or here
    const ratio = found.transformer_bytes / found.bytes;
    const compared = ratio >= 1 ? `${times(ratio)} less` : `${times(1 / ratio)} more`;
    this.figure("kv", `${bytes(found.bytes)}, ${compared} than a Transformer's ${bytes(found.transformer_bytes)}`);
    const bars = this.element.querySelector(".bars");
    const largest = Math.max(found.bytes, found.transformer_bytes, 1);
    bars.hidden = false;
    bars.querySelector(".ours").style.width = `${(100 * found.bytes) / largest}%`;
    bars.querySelector(".transformer").style.width = `${(100 * found.transformer_bytes) / largest}%`;
  }

  figure(name, value) {
    this.element.querySelector(`[data-figure="${name}"]`).textContent = value;
  }

  fail(message) {
    const place = this.element.querySelector(".error");
    place.textContent = message;
    place.hidden = false;
  }

  // Shows a button under the answer.
  offer(label, action) {
    const button = this.element.querySelector(".again");
    button.textContent = label;
    button.onclick = action;
    button.hidden = false;
  }
}
