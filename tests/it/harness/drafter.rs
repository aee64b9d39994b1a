use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::llama_server::LlamaServer;

/// The answer to `POST /draft`.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    pub state: String,
    pub reason: Option<String>,
    pub pos: usize,
    pub tokens: Vec<i32>,
    pub n_prompt: usize,
    pub n_max: usize,
    pub n_steps: usize,
    pub n_drafted: usize,
    pub n_accepted: usize,
    pub step_n: usize,
    pub step_accepted: usize,
    pub step_us: u64,
    #[serde(default)]
    pub step_by: Option<String>,
    #[serde(default)]
    pub step_by_n: usize,
    #[serde(default)]
    pub step_by_accepted: usize,
    #[serde(default)]
    pub drafters: BTreeMap<String, DrafterCounts>,
}

/// Counts of one drafter, in-process or external.
// the names of the protocol
#[allow(clippy::struct_field_names)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct DrafterCounts {
    pub n_steps: usize,
    pub n_drafted: usize,
    pub n_accepted: usize,
}

/// What a drafter saw of one completion.
#[derive(Debug)]
pub struct Followed {
    /// Prompt and generated tokens.
    pub committed: Vec<i32>,
    pub last: Answer,
    pub answers: Vec<Answer>,
}

/// A drafter of one completion that follows a script.
pub struct Drafter {
    url: String,
    key: String,
    client: reqwest::Client,
    /// How long the target is to wait for each offer.
    pub hold: Duration,
}

impl Drafter {
    pub fn new(server: &LlamaServer, key: &str) -> Self {
        Self {
            url: format!("{}/draft", server.url()),
            key: key.to_owned(),
            client: reqwest::Client::new(),
            hold: Duration::from_secs(1),
        }
    }

    /// One call, `body` without the key.
    pub async fn call(&self, mut body: Value) -> Answer {
        body["key"] = json!(self.key);
        let answer = self.client.post(&self.url).json(&body).send().await.expect("an answer");
        let status = answer.status();
        let text = answer.text().await.expect("a body");
        assert_eq!(status, 200, "{body}: {text}");
        serde_json::from_str(&text).expect("an answer of /draft")
    }

    pub async fn wait(&self, pos: usize) -> Answer {
        self.call(json!({ "pos": pos, "wait": true })).await
    }

    /// Attach as soon as the completion is launched, and keep it from generating until the next call with another `n_min`,
    /// or until a second has passed.
    pub async fn attach(&self) -> Answer {
        self.call(json!({ "pos": 0, "wait": true, "n_min": 1, "hold_us": 1_000_000 }))
            .await
    }

    /// Keep holding on.
    pub async fn hold_on(&self, pos: usize) -> Answer {
        self.call(json!({ "pos": pos, "tokens": [], "n_min": 1, "hold_us": 1_000_000 }))
            .await
    }

    /// Follow the completion to its end (not at all if it has begun to generate already); `next` says what to offer after the tokens committed so far.
    pub async fn run(&self, mut next: impl FnMut(&[i32]) -> Vec<i32>) -> Followed {
        let mut committed = Vec::new();
        let mut answers: Vec<Answer> = Vec::new();
        // the first call asks to be waited for, else some steps pass before the first offer arrives
        let mut call = json!({ "pos": 0, "wait": true, "n_min": 1, "hold_us": self.hold.as_micros() });
        loop {
            let answer = self.call(call).await;
            let is_late = answers.is_empty() && answer.n_steps > 0;
            call = json!({ "pos": committed.len() + answer.tokens.len(), "wait": true });
            committed.extend(&answer.tokens);
            answers.push(answer.clone());
            match answer.state.as_str() {
                // some tokens were generated before the first offer could be made: not what the script is for
                _ if is_late => {
                    return Followed {
                        committed,
                        last: answer,
                        answers,
                    };
                }
                "waiting" | "running" => {
                    let tokens = next(&committed);
                    let n_min = tokens.len();
                    let hold_us = self.hold.as_micros();
                    let offer = json!({ "pos": committed.len(), "tokens": tokens, "n_min": n_min, "hold_us": hold_us });
                    self.call(offer).await;
                }
                "done" | "refused" => {
                    return Followed {
                        committed,
                        last: answer,
                        answers,
                    };
                }
                state => panic!("{state} after {} answers", answers.len()),
            }
        }
    }
}

/// Offers what comes next in `text`, up to `n` tokens.
pub fn perfect(text: &[i32], n: usize) -> impl FnMut(&[i32]) -> Vec<i32> + '_ {
    move |committed| text.iter().skip(committed.len()).take(n).copied().collect()
}

/// Like [`perfect`], but the token at every position that `step` divides is another one.
pub fn wrong_at_every(step: usize, text: &[i32], n: usize) -> impl FnMut(&[i32]) -> Vec<i32> + '_ {
    let mut right = perfect(text, n);
    move |committed| {
        let mut tokens = right(committed);
        for (i, token) in tokens.iter_mut().enumerate() {
            if (committed.len() + i) % step == 0 {
                *token = if *token == 1000 { 1001 } else { 1000 };
            }
        }
        tokens
    }
}

/// One request to `path`, drafted for from its beginning: the answer and what the drafter saw.
pub async fn drafted(
    server: &LlamaServer,
    path: &str,
    body: &Value,
    mut next: impl FnMut(&[i32]) -> Vec<i32>,
) -> (Value, Followed) {
    loop {
        let key = new_key();
        let drafter = Drafter::new(server, &key);
        let request = async {
            // the drafter is to be there first
            tokio::time::sleep(Duration::from_millis(5)).await;
            server.send(path, body, Some(&key)).await
        };
        let (followed, (status, answer)) = tokio::join!(drafter.run(&mut next), request);
        assert_eq!(status, 200, "{path}: {answer}");
        // on a busy machine it comes too late nevertheless
        if followed.answers[0].n_steps == 0 {
            return (answer, followed);
        }
    }
}

/// A key that no other completion has.
pub fn new_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}
