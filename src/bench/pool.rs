//! Measures the speed of a pool: prompts of several lengths that no cache holds, one at a time and in parallel. The times are those of the
//! server.
//!
//! The network's share is a lower bound. Each token needs at least one round trip to each worker that has layers, because llama-server reads
//! the worker's result before it starts the next token (llama.cpp b11434, `ggml_backend_rpc_get_tensor`: the only command of a step that
//! waits for an answer). A round trip is measured with new connections to the worker's agent, never with one to its RPC port.

use std::time::{Duration, Instant};

use futures_util::future::{join_all, try_join_all};
use reqwest::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::median;
use crate::config::{Secret, Worker};
use crate::count::count;
use crate::http;
use crate::upstream::ChatError;
use crate::upstream::chat::{client, refused, unreachable, unread};

/// Text that the prompts repeat.
const PROSE: &str = "The miser counted his coins by the light of one candle, then blew it out and counted them again in the \
    dark. In the morning 1,204 of them were still there, and so was the draught beneath the door. ";
/// How often a round trip is measured; the shortest one counts.
const TRIPS: usize = 5;
/// A worker that answers later is not measured.
const TRIP_PATIENCE: Duration = Duration::from_secs(2);
/// Offset in the text between parallel requests, so that no two prompts begin with the same words.
const SHIFT: usize = 7;
/// Longest answer that is read, in bytes.
const MOST_BYTES: usize = 16 << 20;

/// Settings of a measurement.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The model that runs.
    pub model: String,
    /// Most tokens of a slot; `None` if the caller does not know it.
    pub context: Option<u32>,
    /// Lengths of the prompts in tokens.
    pub prompt_sizes: Vec<u32>,
    /// Numbers of parallel requests.
    pub batches: Vec<u16>,
    /// Tokens of each answer.
    pub tokens: u32,
    /// The workers that have layers.
    pub workers: Vec<Worker>,
}

/// Results of a measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// Requests that the server answers at once.
    pub slots: u64,
    /// Tokens that each slot holds.
    pub context: u32,
    /// Tokens of each answer.
    pub tokens: u32,
    /// In the order of the settings.
    pub measured: Vec<Row>,
    /// A sentence with the reason for each combination that was not measured.
    pub left_out: Vec<String>,
    /// The share of the network in the time.
    pub network: Network,
}

/// Results for one prompt length and one number of parallel requests.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Row {
    /// Tokens of each prompt.
    pub prompt_tokens: u32,
    /// Requests at once.
    pub at_once: u16,
    /// Prompt tokens per second, of all requests together.
    pub prompt_per_second: f64,
    /// Generated tokens per second of one request (the median).
    pub generated_per_second_each: f64,
    /// Generated tokens per second of all requests together.
    pub generated_per_second: f64,
}

/// Lower bound of the time that the network takes.
#[derive(Debug, Clone, Serialize)]
pub struct Network {
    /// The round trip to each worker that has layers.
    pub round_trips: Vec<RoundTrip>,
    /// The smallest possible share of the network in the time per token of a single request, from 0 to 1; `None` if a round trip is unknown.
    pub least_share: Option<f64>,
}

/// The round trip to one worker.
#[derive(Debug, Clone, Serialize)]
pub struct RoundTrip {
    /// Name of the worker.
    pub worker: String,
    /// The shortest measured time; `None` if the worker has no agent or its agent does not answer.
    pub milliseconds: Option<f64>,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchmarkError {
    /// The server cannot be asked.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The server answers without what is needed.
    #[error("{url} does not tell {what}; is a llama-server behind it?")]
    NotTold {
        /// The server.
        url: String,
        /// What is missing.
        what: &'static str,
    },
    /// Every combination was left out.
    #[error("nothing can be measured: {}", .0.join("; "))]
    NothingFits(Vec<String>),
}

/// A llama-server's clock: `timings` in its answers.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Timings {
    prompt_n: f64,
    prompt_ms: f64,
    predicted_n: f64,
    predicted_ms: f64,
}

/// Measures the server at a base URL; `tell` hears what is being done.
pub async fn benchmark(
    url: &str,
    key: Option<&Secret>,
    settings: &Settings,
    mut tell: impl FnMut(&str),
) -> Result<Report, BenchmarkError> {
    let server = Server {
        http: client()?,
        url,
        key,
        model: &settings.model,
    };
    let props = server.send(server.http.get(format!("{url}/props"))).await?;
    let not_told = |what| BenchmarkError::NotTold {
        url: url.to_owned(),
        what,
    };
    let told = &props["default_generation_settings"]["n_ctx"];
    let context = told.as_u64().and_then(|tokens| u32::try_from(tokens).ok());
    let context = context.ok_or_else(|| not_told("how long its context is"))?;
    // Slots that share a cache each tell the whole of it.
    let context = context.min(settings.context.unwrap_or(context));
    let slots = props["total_slots"]
        .as_u64()
        .ok_or_else(|| not_told("how many slots it has"))?;
    let (todo, left_out) = fitting(settings, context, slots);
    let Some(first) = todo.first() else {
        return Err(BenchmarkError::NothingFits(left_out));
    };
    let tokens = server.tokens().await?;
    if tokens.is_empty() {
        return Err(not_told("the tokens of a text"));
    }
    tell("warming up");
    server.answer(&tokens, 0, first.0, settings.tokens).await?;
    let mut measured = Vec::new();
    for &(prompt_tokens, at_once) in &todo {
        tell(&format!(
            "{}, {at_once} at once",
            count(prompt_tokens, "token", "tokens")
        ));
        let shifts = (0..usize::from(at_once)).map(|request| request * SHIFT);
        let answers = shifts.map(|shift| server.answer(&tokens, shift, prompt_tokens, settings.tokens));
        let timings = try_join_all(answers).await?;
        measured.extend(row(prompt_tokens, at_once, &timings));
    }
    let round_trips = join_all(settings.workers.iter().map(round_trip)).await;
    let alone = measured.iter().find(|row| row.at_once == 1);
    Ok(Report {
        model: settings.model.clone(),
        slots,
        context,
        tokens: settings.tokens,
        network: Network {
            least_share: alone.and_then(|row| least_share(&round_trips, row.generated_per_second_each)),
            round_trips,
        },
        measured,
        left_out,
    })
}

/// The combinations that fit the server, and the reason for each one that does not.
fn fitting(settings: &Settings, context: u32, slots: u64) -> (Vec<(u32, u16)>, Vec<String>) {
    let mut left_out = Vec::new();
    let fits = |size: u32| u64::from(size) + u64::from(settings.tokens) <= u64::from(context);
    for size in settings.prompt_sizes.iter().filter(|size| !fits(**size)) {
        let size = count(*size, "token", "tokens");
        left_out.push(format!(
            "prompts of {size}: with {} more for the answer they exceed the context of {context}",
            settings.tokens
        ));
    }
    let served = |at_once: u16| u64::from(at_once) <= slots;
    for at_once in settings.batches.iter().filter(|at_once| !served(**at_once)) {
        let slots = count(slots, "slot", "slots");
        left_out.push(format!("{at_once} requests at once: the server has {slots}"));
    }
    let sizes = settings.prompt_sizes.iter().copied().filter(|size| fits(*size));
    let todo = sizes.flat_map(|size| {
        let batches = settings.batches.iter().copied().filter(|at_once| served(*at_once));
        batches.map(move |at_once| (size, at_once))
    });
    (todo.collect(), left_out)
}

/// The figures of requests that were sent at once; `None` for a server whose clock stands still.
fn row(prompt_tokens: u32, at_once: u16, timings: &[Timings]) -> Option<Row> {
    let together = |count: fn(&Timings) -> f64, ms: fn(&Timings) -> f64| {
        let longest = timings.iter().map(ms).max_by(f64::total_cmp)?;
        (longest > 0.0).then(|| 1000.0 * timings.iter().map(count).sum::<f64>() / longest)
    };
    let each: Vec<f64> = timings
        .iter()
        .filter(|timings| timings.predicted_ms > 0.0)
        .map(|timings| 1000.0 * timings.predicted_n / timings.predicted_ms)
        .collect();
    Some(Row {
        prompt_tokens,
        at_once,
        prompt_per_second: together(|timings| timings.prompt_n, |timings| timings.prompt_ms)?,
        generated_per_second_each: median(&each)?,
        generated_per_second: together(|timings| timings.predicted_n, |timings| timings.predicted_ms)?,
    })
}

fn least_share(round_trips: &[RoundTrip], tokens_per_second: f64) -> Option<f64> {
    let trips: Option<Vec<f64>> = round_trips.iter().map(|trip| trip.milliseconds).collect();
    Some((trips?.iter().sum::<f64>() / 1000.0 * tokens_per_second).min(1.0))
}

async fn round_trip(worker: &Worker) -> RoundTrip {
    let mut shortest: Option<f64> = None;
    for _ in 0..TRIPS {
        if !worker.has_agent() {
            break;
        }
        let began = Instant::now();
        let connecting = TcpStream::connect((worker.host.as_str(), worker.agent_port));
        let Ok(Ok(_)) = timeout(TRIP_PATIENCE, connecting).await else {
            break;
        };
        let taken = began.elapsed().as_secs_f64() * 1000.0;
        shortest = Some(shortest.map_or(taken, |shortest| shortest.min(taken)));
    }
    RoundTrip {
        worker: worker.name().to_owned(),
        milliseconds: shortest,
    }
}

struct Server<'a> {
    http: Client,
    url: &'a str,
    key: Option<&'a Secret>,
    model: &'a str,
}

impl Server<'_> {
    /// The tokens of some prose.
    async fn tokens(&self) -> Result<Vec<i64>, BenchmarkError> {
        let request = self.http.post(format!("{}/tokenize", self.url));
        let told = self.send(request.json(&json!({ "content": PROSE }))).await?;
        let tokens = told["tokens"].as_array().into_iter().flatten();
        Ok(tokens.filter_map(Value::as_i64).collect())
    }

    /// Has a prompt of `length` tokens answered, and returns how long that took.
    async fn answer(&self, tokens: &[i64], shift: usize, length: u32, predict: u32) -> Result<Timings, BenchmarkError> {
        let prompt: Vec<i64> = tokens
            .iter()
            .copied()
            .cycle()
            .skip(shift)
            .take(length as usize)
            .collect();
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "n_predict": predict,
            "ignore_eos": true,
            "cache_prompt": false,
            "temperature": 0,
        });
        let answer = self
            .send(self.http.post(format!("{}/completion", self.url)).json(&body))
            .await?;
        serde_json::from_value(answer["timings"].clone()).map_err(|_| BenchmarkError::NotTold {
            url: self.url.to_owned(),
            what: "how long an answer took",
        })
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Value, BenchmarkError> {
        if let Some(key) = self.key {
            request = request.bearer_auth(key.expose());
        }
        let response = request.send().await.map_err(|error| unreachable(self.url, &error))?;
        if !response.status().is_success() {
            return Err(refused(self.url, response).await.into());
        }
        let read = http::client::json(response, MOST_BYTES).await;
        Ok(read.map_err(|error| unread(self.url, error))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings(prompt: (f64, f64), predicted: (f64, f64)) -> Timings {
        Timings {
            prompt_n: prompt.0,
            prompt_ms: prompt.1,
            predicted_n: predicted.0,
            predicted_ms: predicted.1,
        }
    }

    #[test]
    fn requests_at_once_are_as_fast_together_as_all_their_tokens_over_the_longest_of_them() {
        let both = [
            timings((100.0, 500.0), (10.0, 1000.0)),
            timings((100.0, 1000.0), (10.0, 2000.0)),
        ];
        let row = row(100, 2, &both).unwrap();
        assert_eq!(
            (
                row.prompt_per_second,
                row.generated_per_second,
                row.generated_per_second_each
            ),
            (200.0, 10.0, 7.5)
        );
        assert_eq!(super::row(1, 1, &[timings((1.0, 0.0), (1.0, 1.0))]), None);
    }

    #[test]
    fn what_does_not_fit_is_left_out_with_a_reason() {
        let settings = Settings {
            prompt_sizes: vec![64, 2048],
            batches: vec![1, 8],
            tokens: 64,
            ..Settings::default()
        };
        let (todo, left_out) = fitting(&settings, 2048, 4);
        assert_eq!(todo, [(64, 1)]);
        assert!(
            left_out[0].contains("2048") && left_out[1].contains("4 slots"),
            "{left_out:?}"
        );
    }

    #[test]
    fn the_networks_share_is_unknown_unless_every_round_trip_is_known() {
        let trip = |milliseconds| RoundTrip {
            worker: "w".to_owned(),
            milliseconds,
        };
        assert_eq!(least_share(&[trip(Some(1.0)), trip(Some(1.5))], 100.0), Some(0.25));
        assert_eq!(least_share(&[trip(Some(1.0)), trip(None)], 100.0), None);
    }
}
