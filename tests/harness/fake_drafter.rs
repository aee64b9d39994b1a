use std::time::Duration;

use serde_json::json;

use super::fake_upstream::{Act, FakeUpstream, chunk, json as whole, send, stream_head, wait};
use super::llama_server::LlamaServer;

/// A draft server with the vocabulary of a real one, whose drafts follow a script.
pub struct FakeDrafter {
    pub server: FakeUpstream,
}

impl FakeDrafter {
    /// Looks like `real`, and answers `POST /completion` with what `script` makes of the prompt and the length asked for.
    pub async fn like(real: &LlamaServer, script: impl Fn(usize) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let props = real.get_text("/props").await;
        let models = real.get_text("/v1/models").await;
        let n_vocab = real.get("/v1/models").await["data"][0]["meta"]["n_vocab"]
            .as_u64()
            .expect("a number");
        let ids: Vec<u64> = (0..n_vocab).collect();
        let vocabulary = real.post("/detokenize", &json!({ "tokens": ids })).await.to_string();
        let server = FakeUpstream::start(move |seen| match (seen.method.as_str(), seen.target.as_str()) {
            ("GET", "/health") => whole("200 OK", r#"{"status":"ok"}"#),
            ("GET", "/props") => whole("200 OK", &props),
            ("GET", "/v1/models") => whole("200 OK", &models),
            ("POST", "/detokenize") => {
                let body: serde_json::Value = serde_json::from_slice(&seen.body).expect("JSON");
                assert_eq!(body["tokens"], json!(ids), "the whole vocabulary is asked for at once");
                whole("200 OK", &vocabulary)
            }
            ("POST", "/completion") => {
                let body: serde_json::Value = serde_json::from_slice(&seen.body).expect("JSON");
                script(body["n_predict"].as_u64().map_or(0, |n| n as usize))
            }
            other => panic!("a drafter is not asked for {other:?}"),
        })
        .await;
        Self { server }
    }

    /// Streams tokens at random, one per millisecond.
    pub async fn nonsense(real: &LlamaServer) -> Self {
        Self::like(real, |n| {
            let mut acts = vec![stream_head()];
            for i in 1..=n {
                acts.push(wait(1));
                acts.push(event(rand::random_range(100..4000), i));
            }
            acts.extend(end("limit", n));
            acts
        })
        .await
    }

    /// Thinks that every text ends where it is.
    pub async fn ends_at_once(real: &LlamaServer) -> Self {
        Self::like(real, |_| {
            let mut acts = vec![stream_head()];
            acts.extend(end("eos", 1));
            acts
        })
        .await
    }

    /// Takes every request for a draft and never answers.
    pub async fn hangs(real: &LlamaServer) -> Self {
        Self::like(real, |_| vec![Act::Hang]).await
    }

    /// Streams two tokens and then nothing more.
    pub async fn stalls(real: &LlamaServer) -> Self {
        Self::like(real, |_| vec![stream_head(), event(1000, 1), event(1001, 2), Act::Hang]).await
    }

    /// Takes connections and never answers anything.
    pub async fn deaf() -> Self {
        Self {
            server: FakeUpstream::start(|_| vec![Act::Hang]).await,
        }
    }

    /// Seems to be well, and never says what its tokens mean.
    pub async fn secretive(real: &LlamaServer) -> Self {
        let props = real.get_text("/props").await;
        let models = real.get_text("/v1/models").await;
        let server = FakeUpstream::start(move |seen| match seen.target.as_str() {
            "/health" => whole("200 OK", r#"{"status":"ok"}"#),
            "/props" => whole("200 OK", &props),
            "/v1/models" => whole("200 OK", &models),
            _ => vec![Act::Hang],
        })
        .await;
        Self { server }
    }

    /// Answers every request for a draft with an error.
    pub async fn errs(real: &LlamaServer) -> Self {
        Self::like(real, |_| {
            let error = r#"{"error":{"code":500,"message":"out of memory","type":"server_error"}}"#;
            whole("500 Internal Server Error", error)
        })
        .await
    }

    /// Breaks every stream off after a token.
    pub async fn breaks_off(real: &LlamaServer) -> Self {
        Self::like(real, |_| {
            vec![
                stream_head(),
                event(1000, 1),
                send("5\r\ndat"),
                Act::Wait(Duration::from_millis(1)),
                Act::Close,
            ]
        })
        .await
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Requests for drafts so far.
    pub fn asked(&self) -> usize {
        let seen = self.server.seen();
        seen.iter().filter(|seen| seen.target == "/completion").count()
    }
}

fn event(token: u32, n_predicted: usize) -> Act {
    let event = json!({
        "index": 0, "content": " x", "tokens": [token], "stop": false, "id_slot": 0,
        "tokens_predicted": n_predicted, "tokens_evaluated": 1,
    });
    chunk(format!("data: {event}\n\n"))
}

fn end(stop_type: &str, n_predicted: usize) -> [Act; 2] {
    let event = json!({
        "index": 0, "content": "", "tokens": [], "stop": true, "stop_type": stop_type, "id_slot": 0,
        "tokens_predicted": n_predicted, "tokens_evaluated": 1,
    });
    [chunk(format!("data: {event}\n\n")), Act::EndChunks]
}
