// Browsers start no web worker for a page that is read from the disk (file://), and the search runs in one. This class has a
// worker's interface and runs the same script in a hidden frame. Pages from a server keep real workers.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inside = this.frame.contentWindow;
    const loaded = address => new Promise((done, failed) => {
      const script = inside.document.createElement("script");
      script.src = address;
      script.onload = done;
      script.onerror = failed;
      inside.document.body.append(script);
    });
    inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
    inside.importScripts = (...addresses) => addresses.reduce((before, next) => before.then(() => loaded(next)), Promise.resolve());
    this.ready = loaded(url);
  }

  postMessage(data) {
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
