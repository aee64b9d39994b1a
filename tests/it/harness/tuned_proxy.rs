use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tightwad::config::{self, Upstream};
use tightwad::engine::{self, Engine};
use tightwad::proxy::{self, Settings};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A proxy in the runtime of the test.
pub struct TunedProxy {
    pub address: String,
    pub client: reqwest::Client,
    pub shutdown: CancellationToken,
    pub ended: tokio::task::JoinHandle<()>,
}

impl TunedProxy {
    /// In front of `target`, with the defaults but for what `change` does, and with nothing that watches the target.
    pub async fn before(target: &str, change: impl FnOnce(&mut Settings)) -> Self {
        Self::start(target, engine::Settings::default(), change).await
    }

    /// In front of `target`, which is watched, with a drafter.
    pub async fn drafting(target: &str, draft: &str, change: impl FnOnce(&mut Settings)) -> Self {
        let engine = engine::Settings {
            drafts: vec![(Upstream::at(draft), None)],
            target: Some((Upstream::at(target), None)),
            ..engine::Settings::default()
        };
        Self::start(target, engine, change).await
    }

    pub async fn start(target: &str, engine: engine::Settings, change: impl FnOnce(&mut Settings)) -> Self {
        let config = config::Proxy {
            target: Some(Upstream::at(target)),
            ..config::Proxy::default()
        };
        let mut settings = Settings::try_from(&config).unwrap();
        change(&mut settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let serving = proxy::serve(listener, settings, Engine::start(engine).unwrap(), shutdown.clone());
        let ended = tokio::spawn(async { serving.await.unwrap() });
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self {
            address,
            client,
            shutdown,
            ended,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url()))
    }

    pub fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.request(Method::GET, path)
    }

    pub fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        self.request(Method::POST, path).body(body)
    }

    pub async fn status(&self) -> Value {
        self.get("/v1/tightwad/status")
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap()
    }

    /// Waits until the status says this.
    pub async fn is(&self, key: &str, value: &str) {
        for _ in 0..500 {
            if self.status().await[key] == value {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{key} is not {value}: {}", self.status().await);
    }

    /// How the last request ended, once there is one that has.
    pub async fn outcome(&self) -> String {
        for _ in 0..100 {
            if let Some(outcome) = self.status().await["requests"][0]["outcome"].as_str() {
                return outcome.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no request has ended");
    }
}
