// Browsers start no worker from the file system. There, an iframe runs the script of the search in its place.
if (location.protocol === "file:") {
  // Copied and told later, as between a page and a worker: neither waits for the other.
  const later = (message, tell) => {
    const data = structuredClone(message);
    setTimeout(() => tell(new MessageEvent("message", { data })));
  };

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onmessageerror = this.onerror = null;
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => later(data, (event) => this.tell(event));
      const script = inner.document.createElement("script");
      script.src = url;
      script.onload = () => {
        const waiting = this.waiting;
        this.waiting = null;
        waiting.forEach((data) => this.postMessage(data));
      };
      script.onerror = () => this.tell(new ErrorEvent("error", { message: `${url} cannot be loaded` }));
      inner.document.body.append(script);
    }

    tell(event) {
      this[`on${event.type}`]?.(event);
      this.dispatchEvent(event);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else later(data, (event) => this.frame.contentWindow?.dispatchEvent(event));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
