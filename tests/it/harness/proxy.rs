use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tightwad::config::{self, Upstream, VerificationMode};
use tightwad::engine::{self, Engine};
use tightwad::proxy::{self, Settings};
use tightwad::rounds;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::llama_server::answer_of;
use super::wait::eventually;

/// What the proxy recorded of a request; counts that nobody made are 0.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    pub path: String,
    pub streamed: bool,
    pub duration_ms: f64,
    #[serde(default)]
    pub steps: u64,
    #[serde(default)]
    pub drafted: u64,
    #[serde(default)]
    pub accepted: u64,
    #[serde(default)]
    pub generated: u64,
    #[serde(default)]
    pub accepted_prediction_tokens: u64,
    #[serde(default)]
    pub rejected_prediction_tokens: u64,
    pub outcome: String,
}

/// A proxy on a free port of 127.0.0.1, with threads of its own, so that tests can share it.
pub struct Proxy {
    url: String,
    shutdown: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Before the target at one URL, with the drafter at the other.
    pub async fn start(target: &str, draft: Option<&str>) -> Self {
        Self::start_with(target, draft.map(Upstream::at)).await
    }

    /// As [`Self::start`], with any drafters.
    pub async fn start_with(target: &str, drafts: impl IntoIterator<Item = Upstream>) -> Self {
        Self::before(Upstream::at(target), drafts, VerificationMode::Auto).await
    }

    /// As [`Self::start_with`], before a target of any kind.
    pub async fn before(
        upstream: Upstream,
        drafts: impl IntoIterator<Item = Upstream>,
        verification: VerificationMode,
    ) -> Self {
        let drafts: Vec<Upstream> = drafts.into_iter().collect();
        let engine = engine::Settings {
            drafts: drafts.iter().map(|draft| (draft.clone(), None)).collect(),
            target: Some((upstream.clone(), None)),
            verification,
            verifier: rounds::verifier(&upstream, None).expect("an HTTP client"),
            ..engine::Settings::default()
        };
        let config = config::Proxy {
            target: Some(upstream),
            draft: drafts,
            ..config::Proxy::default()
        };
        let settings = Settings::try_from(&config).expect("settings");
        let shutdown = CancellationToken::new();
        let (told, address) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn({
            let shutdown = shutdown.clone();
            move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .expect("a runtime");
                runtime.block_on(async {
                    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                    let address = listener.local_addr().expect("its address");
                    let engine = Engine::start(engine).expect("an engine");
                    told.send(address).expect("the test waits for it");
                    proxy::serve(listener, settings, engine, shutdown)
                        .await
                        .expect("it serves");
                });
                runtime.shutdown_timeout(Duration::from_secs(1));
            }
        });
        Self {
            url: format!("http://{}", address.await.expect("the proxy's address")),
            shutdown,
            thread: Some(thread),
        }
    }

    /// As [`Self::start`], and waits until it drafts.
    pub async fn drafting(target: &str, draft: &str) -> Self {
        Self::drafting_with(target, [Upstream::at(draft)]).await
    }

    /// As [`Self::start_with`], and waits until it drafts.
    pub async fn drafting_with(target: &str, drafts: impl IntoIterator<Item = Upstream>) -> Self {
        let proxy = Self::start_with(target, drafts).await;
        proxy
            .shows("that it drafts", Duration::from_secs(20), |status| {
                status["verification"] == "attached"
                    && status["drafts"][0]["healthy"] == true
                    && status["reason"].is_null()
            })
            .await;
        proxy.settles().await;
        proxy
    }

    /// Waits until the target is left alone: when servers come up, they are measured.
    pub async fn settles(&self) {
        self.shows("that all is measured", Duration::from_secs(30), |status| {
            status["measuring"] == false
        })
        .await;
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub async fn status(&self) -> Value {
        let answer = reqwest::get(format!("{}/v1/tightwad/status", self.url)).await;
        answer
            .expect("the proxy answers")
            .json()
            .await
            .expect("the status is JSON")
    }

    /// Waits until the status shows something, and returns it.
    pub async fn shows(&self, what: &str, within: Duration, is_so: impl Fn(&Value) -> bool) -> Value {
        let shown = eventually(within, || async {
            let status = self.status().await;
            if is_so(&status) { Ok(status) } else { Err(status) }
        });
        shown
            .await
            .unwrap_or_else(|status| panic!("the status does not show {what}: {status:#}"))
    }

    /// A POST, not yet sent, and the id under which the status will show it.
    pub fn request(&self, path: &str, body: &Value) -> (String, reqwest::RequestBuilder) {
        let id = format!("{:032x}", rand::random::<u128>());
        let request = reqwest::Client::new()
            .post(format!("{}{path}", self.url))
            .header("x-request-id", &id)
            .json(body);
        (id, request)
    }

    /// POST as it comes: the status, the JSON, and what was recorded.
    pub async fn send(&self, path: &str, body: &Value) -> (u16, Value, Record) {
        let (id, request) = self.request(path, body);
        let (status, answer) = answer_of(request).await;
        (status, answer, self.record(&id).await)
    }

    /// POST, and expect 200.
    pub async fn post(&self, path: &str, body: &Value) -> (Value, Record) {
        let (status, answer, record) = self.send(path, body).await;
        assert_eq!(status, 200, "{path} {body}: {answer}");
        assert_eq!(record.outcome, "finished", "{record:?}");
        (answer, record)
    }

    /// What was recorded of a request that has ended or is about to.
    pub async fn record(&self, id: &str) -> Record {
        let found = eventually(Duration::from_secs(10), || async {
            let status = self.status().await;
            let requests = status["requests"].as_array().expect("a list of requests");
            let found = requests.iter().find(|request| request["id"] == id).cloned();
            found.ok_or(status)
        });
        let record = found
            .await
            .unwrap_or_else(|status| panic!("no request {id} in {status:#}"));
        serde_json::from_value(record).expect("a record")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the proxy panicked");
        }
    }
}
