//! Memory of the proxy: of streams that are open, and after many requests.

use std::time::Duration;

use super::ProxyProcess;
use crate::harness::fake_upstream::{Act, FakeUpstream, chunk, json as answer, stream_head};
use crate::harness::llama_server::{LlamaServer, model};
use crate::harness::wait::eventually;
use futures_util::stream::{self, StreamExt};
use reqwest::Client;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

impl ProxyProcess {
    /// Its resident memory in KiB.
    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()).expect("VmRSS");
        number.parse().expect("KiB")
    }

    /// Its open files and sockets.
    fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.program.pid());
        std::fs::read_dir(folder).expect("it runs").count()
    }

    async fn status(&self) -> Value {
        let answer = reqwest::get(format!("{}/v1/tightwad/status", self.url())).await;
        answer.unwrap().json().await.unwrap()
    }

    /// Waits until its status shows something.
    async fn shows(&self, what: &str, is_so: impl Fn(&Value) -> bool) {
        let shown = eventually(Duration::from_secs(20), || async {
            let status = self.status().await;
            if is_so(&status) { Ok(()) } else { Err(status) }
        });
        let shown = shown.await;
        shown.unwrap_or_else(|status| panic!("the status does not show {what}: {status:#}"));
    }
}

#[tokio::test]
async fn an_open_stream_takes_little_memory() {
    /// Streams that are opened before the first look, for what is only taken once.
    const FEW: usize = 50;
    const MANY: u64 = 300;
    /// 37 KiB were measured.
    const MOST_EACH: u64 = 100;
    let target = FakeUpstream::start(|seen| match seen.target.as_str() {
        CHAT => vec![stream_head(), chunk("data: 1\n\n"), Act::Hang],
        _ => answer("200 OK", "{}"),
    })
    .await;
    let proxy = ProxyProcess::start(json!({ "target": { "url": target.url() } })).await;
    let url = format!("{}{CHAT}", proxy.url());
    let client = Client::new();
    let open = || async {
        let body = json!({ "stream": true, "messages": [{ "role": "user", "content": "Hello" }] });
        let mut stream = client.post(&url).json(&body).send().await.unwrap();
        assert_eq!(stream.status(), 200);
        assert_eq!(&stream.chunk().await.unwrap().expect("an event")[..], b"data: 1\n\n");
        stream
    };
    let mut streams = Vec::new();
    for _ in 0..FEW {
        streams.push(open().await);
    }
    let before = proxy.resident();
    for _ in 0..MANY {
        streams.push(open().await);
    }
    assert_eq!(proxy.status().await["in_flight"], streams.len());
    let each = proxy.resident().saturating_sub(before) / MANY;
    println!("{each} KiB for each open stream");
    assert!(each <= MOST_EACH, "{each} KiB for each open stream");
    drop(streams);
    proxy
        .shows("that all have left", |status| status["in_flight"] == 0)
        .await;
}

/// Sends one of the requests of the soak: streamed and whole, of each kind, wrong ones, and some that are left.
async fn sends_one(client: &Client, url: &str, number: usize) {
    let prompt = format!("Once upon a time {}", number % 7);
    let chat = |streamed: bool| {
        json!({
            "messages": [{ "role": "user", "content": prompt }], "max_tokens": 8, "stream": streamed, "temperature": 0,
        })
    };
    let text =
        |streamed: bool, n: usize| json!({ "prompt": prompt, "max_tokens": n, "stream": streamed, "temperature": 0 });
    let post = |path: &str, body: &Value| client.post(format!("{url}{path}")).json(body);
    // Few are answered by the model, so that it does not take long.
    let (request, status) = match number % 40 {
        0 => (post(CHAT, &chat(true)), 200),
        4 => (post(CHAT, &chat(false)), 200),
        8 => (post(COMPLETIONS, &text(true, 8)), 200),
        12 => (post("/v1/messages", &chat(false)), 200),
        // The client leaves in the middle of the stream.
        16 => {
            let mut stream = post(COMPLETIONS, &text(true, 400)).send().await.unwrap();
            assert_eq!(stream.status(), 200);
            stream.chunk().await.unwrap().expect("an event");
            return;
        }
        // The client leaves before the answer.
        20 => {
            let sent = post(COMPLETIONS, &text(false, 400)).send();
            let left = tokio::time::timeout(Duration::from_millis(30), sent).await;
            assert!(left.is_err(), "it was answered at once");
            return;
        }
        other => match other % 5 {
            0 => (post("/tokenize", &json!({ "content": "x ".repeat(50_000) })), 200),
            1 => (client.get(format!("{url}/v1/models")), 200),
            2 => (client.post(format!("{url}{CHAT}")).body("{"), 400),
            3 => (client.get(format!("{url}/slots/0?action=erase")), 404),
            _ => (client.get(format!("{url}/metrics")), 200),
        },
    };
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), status, "request {number}");
    answer.bytes().await.unwrap();
}

#[tokio::test]
async fn memory_does_not_grow_with_the_requests_of_a_day() {
    /// Requests before the first look: caches and lists of recent requests are full then.
    const FIRST: usize = 100;
    const REQUESTS: usize = 500;
    /// In KiB. A body kept for each request would take more.
    const MOST_GROWTH: u64 = 4 * 1024;
    let target = LlamaServer::far_target(&["-np", "4", "--jinja", "--spec-draft-external-max", "8"]).await;
    let draft = LlamaServer::start(&model("tightwad-tiny-draft-f16.gguf"), &["-np", "4"]).await;
    let proxy =
        ProxyProcess::start(json!({ "target": { "url": target.url() }, "draft": { "url": draft.url() } })).await;
    let drafts = |status: &Value| status["verification"] == "attached" && status["measuring"] == false;
    proxy.shows("that it drafts", drafts).await;
    let (client, url) = (Client::new(), proxy.url());
    let soak = async |numbers: std::ops::Range<usize>| {
        let requests = numbers.map(|number| sends_one(&client, &url, number));
        stream::iter(requests).buffer_unordered(6).collect::<Vec<()>>().await;
        proxy
            .shows("that all have ended", |status| status["in_flight"] == 0)
            .await;
        (proxy.resident(), proxy.descriptors())
    };
    let (before, few) = soak(0..FIRST).await;
    let (after, more) = soak(FIRST..FIRST + REQUESTS).await;
    println!("{before} KiB after {FIRST} requests, {after} KiB after {REQUESTS} more; {few} and {more} descriptors");
    assert!(after < before + MOST_GROWTH, "{before} KiB became {after} KiB");
    assert!(more <= few + 8, "{few} descriptors became {more}");
    let idle = eventually(Duration::from_secs(5), || async {
        let busy = target.busy_slots().await + draft.busy_slots().await;
        if busy == 0 { Ok(()) } else { Err(busy) }
    });
    idle.await.expect("nothing is left to do");
    let metrics = reqwest::get(format!("{url}/metrics"))
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(
        !metrics.contains("spec_decode_num_accepted_tokens_total 0\n"),
        "{metrics}"
    );
}
