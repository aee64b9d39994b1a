//! Starts and ends the servers of a worker.
//!
//! Invariant: one job runs at a time. Each job waits until the previous one has ended.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::cache::Cache;
use super::survey::{self, Survey};
use super::{ANSWER_TIMEOUT, EndpointSpec, NoServer, START_TIMEOUT, Spec};
use crate::background::contained;
use crate::pool::agent::{DeviceStatus, Endpoint, EndpointState};
use crate::pool::rpc_probe::{RpcServer, probe};
use crate::supervise::child::{Activity, Tail};
use crate::supervise::command::Role;
use crate::supervise::service::{Service, State};
use crate::supervise::{preflight, sockets};

/// How long a survey of an idle worker stays valid: other programs use its GPUs too.
const FRESH: Duration = Duration::from_secs(30);
/// How long a lease waits for the check of the cache. After that it is refused with the progress of the check.
const TIDY_TIMEOUT: Duration = Duration::from_secs(2);

/// The servers of this worker.
#[derive(Debug)]
pub struct Servers {
    spec: Arc<Spec>,
    shown: ServersView,
    keeper: Arc<CacheKeeper>,
    job: Option<Job>,
}

/// A job with the servers: a set of running servers, or a survey.
#[derive(Debug)]
struct Job {
    stop: CancellationToken,
    ended: CancellationToken,
    task: JoinHandle<()>,
}

/// Checks the cache in the background. A check goes on even if no job waits for it any more, so that the check of a big
/// cache ends some day. Only jobs begin a check, and a job that starts servers waits for its end.
#[derive(Debug)]
struct CacheKeeper {
    cache: Cache,
    stop: CancellationToken,
    running: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

/// A view of the servers, readable at any time.
#[derive(Debug, Clone)]
pub struct ServersView(Arc<Mutex<View>>);

#[derive(Debug)]
struct View {
    endpoints: Vec<EndpointView>,
    protocol: Option<String>,
    looked: Option<Instant>,
    /// Last log lines of the servers that have ended.
    last_lines: Vec<String>,
    /// Whether the last job has panicked, which ended its servers.
    panicked: bool,
}

#[derive(Debug)]
struct EndpointView {
    address: SocketAddrV4,
    devices: Vec<DeviceStatus>,
    service: Option<(watch::Receiver<State>, watch::Receiver<Tail>)>,
}

impl Servers {
    /// No server runs yet.
    pub fn new(spec: Arc<Spec>) -> Self {
        let endpoints = spec.endpoints.iter().map(|endpoint| EndpointView {
            address: SocketAddrV4::new(spec.host, endpoint.port),
            devices: Vec::new(),
            service: None,
        });
        let view = View {
            endpoints: endpoints.collect(),
            protocol: None,
            looked: None,
            last_lines: Vec::new(),
            panicked: false,
        };
        Self {
            shown: ServersView(Arc::new(Mutex::new(view))),
            keeper: Arc::new(CacheKeeper::new(spec.cache.clone())),
            spec,
            job: None,
        }
    }

    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    pub fn shown(&self) -> ServersView {
        self.shown.clone()
    }

    /// Surveys the devices for the first time.
    pub async fn first_look(&self, stop: &CancellationToken) -> Result<(), NoServer> {
        look(&self.spec, &self.shown, stop).await
    }

    /// Starts fresh servers once the old ones have ended. The receiver gets the result once they listen. They run until the
    /// next [`Self::start`] or [`Self::end`].
    pub fn start(&mut self) -> oneshot::Receiver<Result<(), NoServer>> {
        let (told, listening) = oneshot::channel();
        let (spec, shown, keeper) = (Arc::clone(&self.spec), self.shown(), Arc::clone(&self.keeper));
        self.next(move |stop| async move { serve(&spec, &shown, &keeper, &stop, told).await });
        listening
    }

    /// Ends the servers, then surveys the devices. The returned token is cancelled once they have ended.
    pub fn end(&mut self) -> CancellationToken {
        let ended = self.job.as_ref().map(|job| job.ended.clone());
        self.look_again();
        ended.unwrap_or_else(|| {
            let none = CancellationToken::new();
            none.cancel();
            none
        })
    }

    /// Surveys the devices if nothing runs and the last survey is stale.
    pub fn refresh(&mut self) {
        let idle = self.job.as_ref().is_none_or(|job| job.task.is_finished());
        let stale = self.shown.0.lock().looked.is_none_or(|looked| looked.elapsed() > FRESH);
        if idle && stale {
            self.look_again();
        }
    }

    /// Ends the running job. The returned token is cancelled once it has ended.
    pub fn shut_down(&mut self) -> Option<CancellationToken> {
        self.keeper.stop.cancel();
        self.job.as_ref().map(|job| {
            job.stop.cancel();
            job.ended.clone()
        })
    }

    fn look_again(&mut self) {
        // A failed survey is not repeated at once either.
        self.shown.0.lock().looked = Some(Instant::now());
        let (spec, shown, keeper) = (Arc::clone(&self.spec), self.shown(), Arc::clone(&self.keeper));
        self.next(move |stop| async move {
            // Check what the servers wrote while no lease waits for it.
            tokio::select! {
                () = keeper.done() => {}
                () = stop.cancelled() => return,
            }
            match look(&spec, &shown, &stop).await {
                Ok(()) | Err(NoServer::Ended) => {}
                Err(error) => {
                    if matches!(error, NoServer::NoDevice { .. }) {
                        shown.forget_devices();
                    }
                    tracing::warn!("cannot look at the devices: {error}");
                }
            }
        });
    }

    fn next<F: Future<Output = ()> + Send>(&mut self, work: impl FnOnce(CancellationToken) -> F + Send + 'static) {
        let shown = self.shown();
        let before = self.job.take();
        if let Some(before) = &before {
            before.stop.cancel();
        }
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        let task = tokio::spawn({
            let (stop, ended) = (stop.clone(), ended.clone().drop_guard());
            async move {
                let _ended = ended;
                if let Some(before) = before {
                    let _ = before.task.await;
                }
                shown.0.lock().panicked = false;
                if !stop.is_cancelled() && contained("the job with the servers", work(stop)).await.is_err() {
                    shown.ended();
                    shown.0.lock().panicked = true;
                }
            }
        });
        self.job = Some(Job { stop, ended, task });
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Runs one set of servers from its start to its end.
async fn serve(
    spec: &Spec,
    shown: &ServersView,
    keeper: &CacheKeeper,
    stop: &CancellationToken,
    told: oneshot::Sender<Result<(), NoServer>>,
) {
    let tidied = tokio::select! {
        tidied = timeout(TIDY_TIMEOUT, keeper.done()) => tidied.map_err(|_| NoServer::Checking(keeper.cache.progress())),
        () = stop.cancelled() => Err(NoServer::Ended),
    };
    if let Err(not_yet) = tidied {
        let _ = told.send(Err(not_yet));
        return;
    }
    let mut services = Vec::new();
    let started = tokio::select! {
        started = bring_up(spec, shown, stop, &mut services) => started,
        () = stop.cancelled() => Err(NoServer::Ended),
    };
    let listening = started.is_ok();
    // If the requester has left, the lease ends, and this job with it.
    let _ = told.send(started);
    if listening {
        stop.cancelled().await;
    }
    join_all(services.into_iter().map(Service::stop)).await;
    shown.ended();
}

async fn bring_up(
    spec: &Spec,
    shown: &ServersView,
    stop: &CancellationToken,
    services: &mut Vec<Service>,
) -> Result<(), NoServer> {
    for endpoint in &spec.endpoints {
        preflight::port_free(&spec.host.to_string(), endpoint.port)?;
    }
    // A server that dies loses its part of the model; a fresh one in its place would look healthy without it.
    for (number, endpoint) in spec.endpoints.iter().enumerate() {
        let launch = survey::bound(endpoint, &shown.devices(number))?;
        services.push(Service::start_once(Role::Rpc, launch, stop));
    }
    shown.started(services);
    for (number, (endpoint, service)) in spec.endpoints.iter().zip(services.iter()).enumerate() {
        listens(endpoint, service).await?;
        // No client knows of the server yet.
        let told = probe(SocketAddrV4::new(spec.host, endpoint.port).into(), ANSWER_TIMEOUT).await?;
        shown.record(number, &told);
    }
    Ok(())
}

/// Waits until the server listens or dies for the first time.
async fn listens(endpoint: &EndpointSpec, service: &Service) -> Result<(), NoServer> {
    let port = endpoint.port;
    let mut state = service.state();
    let settled = state.wait_for(|state| !matches!(state, State::Starting | State::Loading));
    match timeout(START_TIMEOUT, settled).await {
        Err(_) => Err(NoServer::Slow { port }),
        Ok(Err(_)) => Err(NoServer::Ended),
        Ok(Ok(state)) => match &*state {
            State::Waiting { death, .. } | State::GaveUp { death } => Err(NoServer::Died {
                port,
                death: death.clone(),
            }),
            State::Stopped => Err(NoServer::Ended),
            State::Starting | State::Loading | State::Ready { .. } => Ok(()),
        },
    }
}

impl CacheKeeper {
    fn new(cache: Cache) -> Self {
        Self {
            cache,
            stop: CancellationToken::new(),
            running: tokio::sync::Mutex::default(),
        }
    }

    /// Waits until the check of the cache is done.
    async fn done(&self) {
        let mut running = self.running.lock().await;
        let task = running.get_or_insert_with(|| {
            let (cache, stop) = (self.cache.clone(), self.stop.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = cache.tidy(&stop) {
                    tracing::warn!("{error}");
                }
            })
        });
        let _ = task.await;
        *running = None;
    }
}

async fn look(spec: &Spec, shown: &ServersView, stop: &CancellationToken) -> Result<(), NoServer> {
    for (number, endpoint) in spec.endpoints.iter().enumerate() {
        let look = survey::look(endpoint, stop).await?;
        shown.looked(number, look);
    }
    Ok(())
}

impl ServersView {
    fn looked(&self, number: usize, look: Survey) {
        let mut view = self.0.lock();
        view.protocol = Some(look.protocol);
        view.looked = Some(Instant::now());
        if let Some(endpoint) = view.endpoints.get_mut(number) {
            endpoint.devices = look.devices;
        }
    }

    /// Forgets all devices, so that no plan counts with GPUs that are gone.
    fn forget_devices(&self) {
        for endpoint in &mut self.0.lock().endpoints {
            endpoint.devices.clear();
        }
    }

    fn devices(&self, number: usize) -> Vec<DeviceStatus> {
        let view = self.0.lock();
        view.endpoints
            .get(number)
            .map_or(Vec::new(), |endpoint| endpoint.devices.clone())
    }

    /// The devices of all endpoints, for the log.
    pub fn lent(&self) -> String {
        let view = self.0.lock();
        list(view.endpoints.iter().flat_map(|endpoint| &endpoint.devices))
    }

    fn started(&self, services: &[Service]) {
        for (endpoint, service) in self.0.lock().endpoints.iter_mut().zip(services) {
            endpoint.service = Some((service.state(), service.tail()));
        }
    }

    /// Takes in the report of a server that has no client yet.
    fn record(&self, number: usize, told: &RpcServer) {
        let mut view = self.0.lock();
        view.protocol = Some(told.protocol.to_string());
        if let Some(endpoint) = view.endpoints.get_mut(number)
            && endpoint.devices.len() == told.devices.len()
        {
            for (device, memory) in endpoint.devices.iter_mut().zip(&told.devices) {
                device.total_bytes = memory.total_bytes;
                device.free_bytes = memory.free_bytes;
            }
        }
    }

    fn ended(&self) {
        let lines = self.last_lines();
        let mut view = self.0.lock();
        view.last_lines = lines;
        for endpoint in &mut view.endpoints {
            endpoint.service = None;
        }
    }

    pub fn protocol(&self) -> Option<String> {
        self.0.lock().protocol.clone()
    }

    pub fn endpoints(&self) -> Vec<Endpoint> {
        let view = self.0.lock();
        let endpoints = view.endpoints.iter().map(|endpoint| Endpoint {
            port: endpoint.address.port(),
            state: if view.panicked {
                EndpointState::Failed
            } else {
                endpoint.state()
            },
            devices: endpoint.devices.clone(),
        });
        endpoints.collect()
    }

    pub fn last_lines(&self) -> Vec<String> {
        let view = self.0.lock();
        let running = view.endpoints.iter().filter_map(|endpoint| endpoint.service.as_ref());
        let lines: Vec<String> = running.flat_map(|(_, tail)| tail.borrow().lines()).collect();
        if lines.is_empty() {
            view.last_lines.clone()
        } else {
            lines
        }
    }
}

/// Formats devices as `CUDA0 (NVIDIA GeForce RTX 4070)`.
pub fn list<'a>(devices: impl IntoIterator<Item = &'a DeviceStatus>) -> String {
    let devices = devices.into_iter();
    let shown: Vec<String> = devices.map(|it| format!("{} ({})", it.name, it.description)).collect();
    shown.join(", ")
}

impl EndpointView {
    fn state(&self) -> EndpointState {
        let Some((state, _)) = &self.service else {
            return EndpointState::Idle;
        };
        match &*state.borrow() {
            State::Starting | State::Loading => EndpointState::Starting,
            // A stopped process keeps its connections and does not answer.
            State::Ready { pid } if Activity::of(*pid).is_stopped => EndpointState::Failed,
            State::Ready { .. } if sockets::is_connected(self.address).unwrap_or(false) => EndpointState::Connected,
            State::Ready { .. } => EndpointState::Listening,
            State::Waiting { .. } | State::GaveUp { .. } => EndpointState::Failed,
            State::Stopped => EndpointState::Idle,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::config::Worker;
    use crate::supervise::command::Launch;

    #[tokio::test]
    async fn a_job_that_panics_shows_as_failed_until_the_next() {
        let endpoint = EndpointSpec {
            port: 1,
            launch: Launch {
                program: "/no/such/program".into(),
                args: Vec::new(),
                env: Vec::new(),
                gpus: None,
                stall: Duration::ZERO,
            },
        };
        let mut servers = Servers::new(Arc::new(Spec {
            name: "w".to_owned(),
            host: Ipv4Addr::LOCALHOST,
            build: "b1".to_owned(),
            endpoints: vec![endpoint],
            cache: Cache::none(),
        }));
        let shown = servers.shown();
        servers.next(|_| async { panic!("on purpose") });
        servers.job.as_ref().unwrap().ended.cancelled().await;
        assert!(shown.endpoints()[0].state == EndpointState::Failed);
        servers.next(|_| async {});
        servers.job.as_ref().unwrap().ended.cancelled().await;
        assert!(shown.endpoints()[0].state == EndpointState::Idle);
    }

    #[tokio::test]
    async fn a_check_of_the_cache_goes_on_when_nobody_waits_for_it_any_more() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("rpc")).unwrap();
        let broken = folder.path().join("rpc/0123456789abcdef");
        std::fs::File::create(&broken).unwrap().set_len(64 << 20).unwrap();
        let worker = Worker {
            cache_dir: Some(folder.path().to_owned()),
            ..Worker::at("127.0.0.1")
        };
        let keeper = CacheKeeper::new(Cache::of(&worker));
        for _ in 0..3 {
            assert!(timeout(Duration::from_millis(5), keeper.done()).await.is_err());
        }
        assert_eq!(keeper.cache.progress().of, 64 << 20);
        let begun = keeper.running.lock().await.as_ref().map(JoinHandle::id);
        assert!(begun.is_some());
        keeper.done().await;
        assert!(!broken.exists());
    }
}
