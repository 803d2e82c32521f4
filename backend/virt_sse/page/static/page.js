"use strict";
// Updates the page in place while it is visible. Without this script, everything works after a reload.
(() => {
  const live = document.getElementById("live");
  const seconds = Number(live.dataset.seconds);
  let shown = document.getElementById("content").innerHTML;

  const say = (text) => {
    document.getElementById("live").textContent = text;
  };

  async function update() {
    if (document.hidden) return;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", redirect: "error" });
      if (!answer.ok) throw new Error(await answer.text());
      const parsed = new DOMParser().parseFromString(await answer.text(), "text/html");
      const now = parsed.getElementById("content");
      document.querySelector("footer time").replaceWith(parsed.querySelector("footer time"));
      if (now.innerHTML !== shown && String(getSelection()) === "") {
        shown = now.innerHTML;
        const focused = document.activeElement && document.activeElement.getAttribute("href");
        document.getElementById("content").replaceChildren(...now.childNodes);
        document.querySelector("nav").replaceWith(parsed.querySelector("nav"));
        if (focused) {
          const links = [...document.querySelectorAll("a[href]")];
          const link = links.find((each) => each.getAttribute("href") === focused);
          if (link) link.focus({ preventScroll: true });
        }
      }
      say("Updates itself every " + seconds + " s.");
    } catch (error) {
      say("No update: " + (error.message || "the agent does not answer"));
    }
  }

  say("Updates itself every " + seconds + " s.");
  setInterval(update, seconds * 1000);
  document.addEventListener("visibilitychange", update);
})();
