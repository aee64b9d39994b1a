use std::sync::Mutex;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::fake_upstream::{Act, FakeUpstream, chunk, json as whole, send, stream_head};
use super::llama_server::LlamaServer;

/// A request for a draft.
#[derive(Debug, Deserialize)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub n_predict: usize,
    pub stream: bool,
}

/// A draft server with the vocabulary of a real one, whose drafts follow a script.
pub struct FakeDrafter {
    pub server: FakeUpstream,
}

impl FakeDrafter {
    /// Looks like `real`, and answers `POST /completion` with what `script` makes of the request.
    pub async fn like(real: &LlamaServer, script: impl Fn(&Request) -> Vec<Act> + Send + Sync + 'static) -> Self {
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
            ("POST", "/completion") => script(&serde_json::from_slice(&seen.body).expect("a request for a draft")),
            other => panic!("a drafter is not asked for {other:?}"),
        })
        .await;
        Self { server }
    }

    /// Streams tokens at random, without delay: what is late is not verified.
    pub async fn nonsense(real: &LlamaServer) -> Self {
        Self::like(real, |request| {
            let tokens: Vec<u32> = (0..request.n_predict).map(|_| rand::random_range(100..4000)).collect();
            draft(request, &tokens, "limit")
        })
        .await
    }

    /// Knows what it was asked to continue before, and has nothing to add to anything else: whoever asks for the same
    /// text again gets it from the first token to nearly the last.
    pub async fn remembering(real: &LlamaServer) -> Self {
        let texts: Mutex<Vec<Vec<u32>>> = Mutex::default();
        Self::like(real, move |request| {
            let mut texts = texts.lock().expect("no panic before");
            let known = texts
                .iter()
                .filter_map(|text| text.strip_prefix(&request.prompt[..]))
                .max_by_key(|rest| rest.len());
            let rest: Vec<u32> = known.into_iter().flatten().copied().take(request.n_predict).collect();
            texts.push(request.prompt.clone());
            all_it_knows(request, &rest, Duration::ZERO)
        })
        .await
    }

    /// Knows these texts, of prompt and answer, and goes on with them by a token each `pause`.
    pub async fn dawdles(real: &LlamaServer, texts: Vec<Vec<u32>>, pause: Duration) -> Self {
        Self::like(real, move |request| {
            let known = texts
                .iter()
                .find_map(|text| text.strip_prefix(&request.prompt[..]))
                .unwrap_or_default();
            let rest = &known[..known.len().min(request.n_predict)];
            all_it_knows(request, rest, pause)
        })
        .await
    }

    /// Thinks that every text ends where it is.
    pub async fn ends_at_once(real: &LlamaServer) -> Self {
        Self::like(real, |request| draft(request, &[], "eos")).await
    }

    /// Takes every request for a draft and never answers.
    pub async fn hangs(real: &LlamaServer) -> Self {
        Self::like(real, |_| vec![Act::Hang]).await
    }

    /// Streams two tokens and then nothing more.
    pub async fn stalls(real: &LlamaServer) -> Self {
        Self::like(real, |request| {
            if request.stream {
                vec![stream_head(), event(1000, 1), event(1001, 2), Act::Hang]
            } else {
                vec![Act::Hang]
            }
        })
        .await
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

    /// Drafts that were asked for and neither came to an end nor were given up, of a drafter that never ends one.
    pub fn unended(&self) -> usize {
        // In this order: what was given up was asked for before.
        let left = self.server.left();
        self.asked() - left
    }

    /// Requests for drafts so far.
    pub fn asked(&self) -> usize {
        self.requests().len()
    }

    /// What was asked for so far.
    pub fn requests(&self) -> Vec<Request> {
        let seen = self.server.seen();
        let drafts = seen.iter().filter(|seen| seen.target == "/completion");
        drafts
            .map(|seen| serde_json::from_slice(&seen.body).expect("a request for a draft"))
            .collect()
    }
}

fn event(token: u32, n_predicted: usize) -> Act {
    let event = json!({
        "index": 0, "content": " x", "tokens": [token], "stop": false, "id_slot": 0,
        "tokens_predicted": n_predicted, "tokens_evaluated": 1,
    });
    chunk(format!("data: {event}\n\n"))
}

/// A whole answer.
pub fn draft(request: &Request, tokens: &[u32], stop_type: &str) -> Vec<Act> {
    draft_slowly(request, tokens, stop_type, Duration::ZERO)
}

/// A whole answer of a drafter for which the text ends where it knows no more.
fn all_it_knows(request: &Request, rest: &[u32], pause: Duration) -> Vec<Act> {
    let stop_type = if rest.len() < request.n_predict { "eos" } else { "limit" };
    draft_slowly(request, rest, stop_type, pause)
}

/// A whole answer, with a pause before each token.
fn draft_slowly(request: &Request, tokens: &[u32], stop_type: &str, pause: Duration) -> Vec<Act> {
    let n = u32::try_from(tokens.len()).expect("a few tokens");
    let took = pause * n.saturating_sub(1);
    let end = json!({
        "index": 0, "content": "", "tokens": if request.stream { &[] } else { tokens }, "stop": true, "stop_type": stop_type,
        "id_slot": 0, "tokens_predicted": n, "tokens_evaluated": 1, "timings/predicted_ms": took.as_secs_f64() * 1e3,
    });
    if !request.stream {
        let mut acts = whole("200 OK", &end.to_string());
        acts.insert(0, Act::Wait(pause * n));
        return acts;
    }
    let mut acts = vec![stream_head()];
    for (token, i) in tokens.iter().zip(1..) {
        if !pause.is_zero() {
            acts.push(Act::Wait(pause));
        }
        acts.push(event(*token, i));
    }
    acts.extend([chunk(format!("data: {end}\n\n")), Act::EndChunks]);
    acts
}
