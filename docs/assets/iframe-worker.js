// A page opened as a file may start no worker, so there the theme's search runs in a hidden frame.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.appendChild(frame);
    this.inside = frame.contentWindow;
    addEventListener("message", (event) => {
      if (event.source === this.inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
    });
    this.inside.document.open(); // removes listeners, so the one below comes later
    const answer = '<script>postMessage = (data) => parent.postMessage(data, "*")</script>';
    this.inside.document.write(`${answer}<script src="${url}"></script>`);
    this.loaded = new Promise((resolve) => { this.inside.onload = resolve; });
    this.inside.document.close();
  }

  async postMessage(data) {
    await this.loaded;
    this.inside.dispatchEvent(new MessageEvent("message", { data }));
  }

  terminate() {}
}
if (location.protocol === "file:") window.Worker = FrameWorker;
