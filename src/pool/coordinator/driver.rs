//! Carries out the actions of the swap machine ([`crate::pool::swap`]) and feeds the results back as events.
//!
//! Invariant: the driver alone touches the server and the leases, one action at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::load::Load;
use super::pool::{Message, Report, ServerInstance};
use super::prepare::{OwnFree, PlanBasis, Planner, Prepared};
use super::server::{self, Run};
use super::workers::{Leases, Workers};
use crate::background::{contained, kept_running};
use crate::config::{Config, Coordinator};
use crate::pool::devices::ProbedServers;
use crate::pool::swap::{Action, Ended, Event, Failure, Id, Name, NotReady, Refused, State, Swap};

/// Longest time between two ticks of the machine.
const TICK: Duration = Duration::from_secs(1);

/// The driver. It owns everything that lasts, so dropping it ends everything.
pub(super) struct Driver {
    coordinator: Arc<Coordinator>,
    planner: Arc<Planner>,
    workers: Workers,
    swap: Swap,
    tell: mpsc::UnboundedSender<Message>,
    told: mpsc::UnboundedReceiver<Message>,
    report: watch::Sender<Report>,
    waiting: HashMap<Id, oneshot::Sender<Result<Arc<ServerInstance>, Refused>>>,
    /// Cancels the leasing in progress.
    leasing: CancellationToken,
    /// Free memory of the coordinator's own GPUs while nothing ran.
    own_free: OwnFree,
    /// The leases in hand, and the start prepared with them.
    taken: Option<Taken>,
    /// The server that runs or is being started.
    server: Option<Running>,
    /// The last logged reason why no server runs.
    in_the_way: Option<String>,
}

struct Taken {
    leases: Leases,
    prepared: Option<Prepared>,
}

struct Running {
    instance: Arc<ServerInstance>,
    stop: Option<oneshot::Sender<bool>>,
    began: Instant,
    pid: oneshot::Receiver<u32>,
    last_lines: oneshot::Receiver<Vec<String>>,
}

/// The result of leasing, sent to the driver.
pub(super) type Outcome = Result<(Leases, Prepared), NotReady>;

impl Driver {
    pub(super) fn new(
        config: Arc<Config>,
        coordinator: Arc<Coordinator>,
        workers: Workers,
        swap: Swap,
        (tell, told): (mpsc::UnboundedSender<Message>, mpsc::UnboundedReceiver<Message>),
    ) -> (Self, watch::Receiver<Report>) {
        let report = watch::Sender::new(Report {
            now: swap.snapshot(),
            load: Load::default(),
            pid: None,
            since: Instant::now(),
            instance: None,
            workers: workers.reports(),
            devices: Vec::new(),
            starts: 0,
            last_lines: Vec::new(),
        });
        let reports = report.subscribe();
        let driver = Self {
            planner: Arc::new(Planner::new(config, Arc::clone(&coordinator))),
            coordinator,
            workers,
            swap,
            tell,
            told,
            report,
            waiting: HashMap::new(),
            leasing: CancellationToken::new(),
            own_free: OwnFree::new(),
            taken: None,
            server: None,
            in_the_way: None,
        };
        (driver, reports)
    }

    /// Drives until `stop`, then shuts down in order.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let (workers, tell) = (self.workers.clone(), self.tell.clone());
        let watching = tokio::spawn(async move {
            let watch = || workers.clone().watch(tell.clone());
            kept_running("the watching of the workers", watch).await;
        });
        let (outcomes, mut outcome) = mpsc::unbounded_channel();
        let mut stopping = false;
        let mut going = self.handle(Event::Tick, &outcomes);
        while going {
            let now = Instant::now();
            let tick = self
                .swap
                .next_tick()
                .map_or(TICK, |tick| tick.saturating_duration_since(now).min(TICK));
            going = tokio::select! {
                Some(message) = self.told.recv() => self.receive(message, &outcomes),
                Some((epoch, outcome)) = outcome.recv() => self.leased(epoch, outcome, &outcomes),
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    self.handle(Event::Shutdown, &outcomes)
                }
                () = tokio::time::sleep(tick) => self.handle(Event::Tick, &outcomes),
            };
        }
        watching.abort();
    }

    fn receive(&mut self, message: Message, outcomes: &mpsc::UnboundedSender<(u64, Outcome)>) -> bool {
        match message {
            Message::Event(event) => self.handle(event, outcomes),
            Message::Ask {
                id,
                model,
                command,
                answer,
            } => {
                self.waiting.insert(id, answer);
                self.handle(Event::Asked { id, model, command }, outcomes)
            }
            Message::Loaded(epoch, progress) => {
                if let Some(running) = self.server.as_ref().filter(|_| self.swap.snapshot().epoch == epoch) {
                    let load = Load::after(progress, running.began.elapsed());
                    self.report.send_modify(|report| report.load = load);
                }
                true
            }
            Message::Worker(index, worker) => {
                self.report
                    .send_if_modified(|report| match report.workers.get_mut(index) {
                        Some(known) if *known != worker => {
                            *known = worker;
                            true
                        }
                        _ => false,
                    });
                true
            }
        }
    }

    fn leased(&mut self, epoch: u64, outcome: Outcome, outcomes: &mpsc::UnboundedSender<(u64, Outcome)>) -> bool {
        let result = outcome.map(|(leases, prepared)| {
            self.own_free.clone_from(&prepared.own_free);
            self.taken = Some(Taken {
                leases,
                prepared: Some(prepared),
            });
        });
        if let Err(NotReady::Retryable(why) | NotReady::Permanent(why)) = &result
            && !self.leasing.is_cancelled()
        {
            self.in_the_way(why);
        }
        self.handle(Event::Leased(epoch, result), outcomes)
    }

    /// Logs why the model cannot start, unless that was the last thing logged.
    fn in_the_way(&mut self, why: &str) {
        if self.in_the_way.as_deref() != Some(why) {
            tracing::warn!("not ready to start: {why}");
            self.in_the_way = Some(why.to_owned());
        }
    }

    /// Hands an event to the machine and carries its actions out. Returns whether to continue.
    fn handle(&mut self, event: Event, outcomes: &mpsc::UnboundedSender<(u64, Outcome)>) -> bool {
        if let Event::Left(id) = &event {
            self.waiting.remove(id);
        }
        if let Event::Died(_, failure) | Event::Broken(_, failure) = &event
            && self.in_the_way.as_ref() != Some(&failure.why)
        {
            tracing::error!("{}", failure.why);
            self.in_the_way = Some(failure.why.clone());
        }
        if let Event::Ready(_) = &event
            && let Some(running) = &self.server
        {
            tracing::info!("ready after {:.1} s", running.began.elapsed().as_secs_f32());
            self.in_the_way = None;
        }
        if matches!(event, Event::Died(..) | Event::Stopped(_)) {
            self.collect_last_lines();
        }
        let mut going = true;
        for action in self.swap.handle(Instant::now(), event) {
            going &= self.act(action, outcomes);
        }
        self.publish();
        going
    }

    fn act(&mut self, action: Action, outcomes: &mpsc::UnboundedSender<(u64, Outcome)>) -> bool {
        match action {
            Action::Admit(id) => {
                let instance = self.server.as_ref().map(|running| Arc::clone(&running.instance));
                self.answer(id, instance.ok_or(Refused::Shutdown));
            }
            Action::Refuse(id, why) => self.answer(id, Err(why)),
            Action::Check(model) => self.check(model),
            Action::Lease(epoch, model) => self.lease(epoch, model, outcomes.clone()),
            Action::CancelLease(_) => self.leasing.cancel(),
            Action::Start(epoch, model) => self.start(epoch, &model),
            Action::EndAnswers(why) => self.end_answers(why),
            Action::Stop { epoch, broken } => self.stop(epoch, broken),
            Action::Free(epoch) => self.free(epoch),
            Action::Exit => return false,
        }
        true
    }

    fn answer(&mut self, id: Id, answer: Result<Arc<ServerInstance>, Refused>) {
        if let Some(waiter) = self.waiting.remove(&id) {
            // A client that has left drops its receiver.
            let _ = waiter.send(answer);
        }
    }

    fn check(&self, model: Name) {
        let (planner, tell) = (Arc::clone(&self.planner), self.tell.clone());
        let own_free = self.server.is_some().then(|| self.own_free.clone());
        let asked = model.clone();
        let check = async move {
            let unasked = ProbedServers::new();
            let basis = own_free
                .as_ref()
                .map_or(PlanBasis::FreeNow(&unasked), PlanBasis::BesideServer);
            match planner.plan(&asked, basis).await {
                Ok(_) => Ok(()),
                Err(NotReady::Retryable(why) | NotReady::Permanent(why)) => Err(why),
            }
        };
        spawn("the check of a model", check, Err, move |result| {
            let _ = tell.send(Message::Event(Event::Checked(model, result)));
        });
    }

    fn lease(&mut self, epoch: u64, model: Name, outcomes: mpsc::UnboundedSender<(u64, Outcome)>) {
        let planner = Arc::clone(&self.planner);
        let (workers, tell) = (self.workers.clone(), self.tell.clone());
        let cancel = CancellationToken::new();
        self.leasing = cancel.clone();
        let lease = async move {
            // Check the model before any worker starts servers for it.
            let ready = async {
                let probed = workers.ask().await?;
                planner.plan(&model, PlanBasis::FreeNow(&probed)).await?;
                Ok(probed)
            };
            let probed = unless(&cancel, ready).await?;
            let leases = workers.lease(epoch, &tell, &cancel).await?;
            // Fresh servers report the free memory best.
            let prepared = async {
                let plan = planner.plan(&model, PlanBasis::FreeNow(&probed)).await?;
                planner.launch(&model, &plan).await
            };
            match unless(&cancel, prepared).await {
                Ok(prepared) => Ok((leases, prepared)),
                Err(not_ready) => {
                    leases.give_back().await;
                    Err(not_ready)
                }
            }
        };
        let panicked = |why| Err(NotReady::Retryable(why));
        spawn("the leasing of the workers", lease, panicked, move |outcome| {
            // If the driver has ended, the leases are dropped and expire.
            let _ = outcomes.send((epoch, outcome));
        });
    }

    fn start(&mut self, epoch: u64, model: &Name) {
        let tell = self.tell.clone();
        let die = move |why: String| {
            let failure = Failure {
                why,
                curable: true,
                worker: false,
            };
            let _ = tell.send(Message::Event(Event::Died(epoch, failure)));
        };
        let Some(prepared) = self.taken.as_mut().and_then(|taken| taken.prepared.take()) else {
            return die("nothing was prepared for this start".to_owned());
        };
        let instance = match ServerInstance::new(&prepared.url, &prepared.key) {
            Ok(instance) => Arc::new(instance),
            Err(error) => return die(error.to_string()),
        };
        tracing::info!("starting `{model}`: {}", prepared.devices.join("; "));
        let (stop, stopped) = oneshot::channel();
        let (started, pid) = oneshot::channel();
        let (last, last_lines) = oneshot::channel();
        let run = server::run(Run {
            epoch,
            launch: prepared.launch,
            key: prepared.key,
            stall: Duration::from_secs(self.coordinator.stall_seconds),
            workers: self.workers.clone(),
            tell: self.tell.clone(),
            stop: stopped,
            started,
            last_lines: last,
        });
        let run = async move {
            run.await;
            None
        };
        spawn("the watching of the llama-server", run, Some, move |panicked| {
            if let Some(why) = panicked {
                die(why);
            }
        });
        self.server = Some(Running {
            instance,
            stop: Some(stop),
            began: Instant::now(),
            pid,
            last_lines,
        });
        self.report.send_modify(|report| {
            report.devices = prepared.devices;
            report.starts += 1;
            report.load = Load::default();
            report.pid = None;
        });
    }

    fn end_answers(&self, why: Ended) {
        if let Some(running) = &self.server {
            running.instance.end(why);
        }
    }

    fn stop(&mut self, epoch: u64, broken: bool) {
        // All counted answers are over by now. Uncounted requests, such as a drafter's measurements, are not waited for.
        self.end_answers(Ended::Shutdown);
        let stop = self.server.as_mut().and_then(|running| running.stop.take());
        if stop.is_none_or(|stop| stop.send(broken).is_err()) {
            // The server has ended by itself.
            let _ = self.tell.send(Message::Event(Event::Stopped(epoch)));
        }
    }

    fn free(&mut self, epoch: u64) {
        if let Some(running) = self.server.take() {
            // Ends uncounted requests, such as a drafter's.
            running.instance.end(Ended::Shutdown);
        }
        let (taken, tell) = (self.taken.take(), self.tell.clone());
        let give_back = async move {
            if let Some(taken) = taken {
                taken.leases.give_back().await;
            }
        };
        // Leases that were not returned expire.
        spawn("the return of the leases", give_back, drop, move |()| {
            let _ = tell.send(Message::Event(Event::Freed(epoch)));
        });
    }

    fn collect_last_lines(&mut self) {
        if let Some(running) = &mut self.server
            && let Ok(lines) = running.last_lines.try_recv()
        {
            self.report.send_modify(|report| report.last_lines = lines);
        }
    }

    fn publish(&mut self) {
        let now = self.swap.snapshot();
        let serves = matches!(now.state, State::Ready | State::Draining);
        let instance = self
            .server
            .as_ref()
            .filter(|_| serves)
            .map(|running| Arc::clone(&running.instance));
        let pid = self.server.as_mut().and_then(|running| running.pid.try_recv().ok());
        let (gone, in_the_way) = (self.server.is_none(), self.in_the_way.is_some());
        self.report.send_if_modified(|report| {
            let changed = report.now != now || pid.is_some() || report.instance.is_some() != instance.is_some();
            if report.now.state != now.state {
                report.since = Instant::now();
                // Log repeated failed tries at debug level only.
                if in_the_way && matches!(now.state, State::Leasing | State::Down) {
                    tracing::debug!("`{}` is {}", now.model, now.state);
                } else {
                    tracing::info!("`{}` is {}", now.model, now.state);
                }
            }
            if gone {
                report.pid = None;
                report.load = Load::default();
                report.devices.clear();
            }
            report.pid = pid.or(report.pid);
            report.now = now;
            report.instance = instance;
            changed
        });
    }
}

/// Runs `work` in the background and sends its result. `panicked` makes the result of a panic, because the machine would wait for
/// it for ever.
fn spawn<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = T> + Send + 'static,
    panicked: impl FnOnce(String) -> T + Send + 'static,
    send: impl FnOnce(T) + Send + 'static,
) {
    tokio::spawn(async move {
        let result = contained(what, work).await;
        send(result.unwrap_or_else(|panic| panicked(panic.to_string())));
    });
}

/// The result of `work`, unless it is cancelled first.
async fn unless<T>(cancel: &CancellationToken, work: impl Future<Output = Result<T, NotReady>>) -> Result<T, NotReady> {
    tokio::select! {
        result = work => result,
        () = cancel.cancelled() => Err(cancelled()),
    }
}

/// A placeholder reason; whoever cancels knows the real one.
pub(super) fn cancelled() -> NotReady {
    NotReady::Retryable("cancelled".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_sends_a_result_too() {
        let (send, result) = oneshot::channel();
        let work = async {
            tokio::task::yield_now().await;
            panic!("on purpose")
        };
        spawn("the work", work, Err::<(), _>, |result| send.send(result).unwrap());
        let why = result.await.unwrap().unwrap_err();
        assert!(why.contains("on purpose"), "{why}");
    }
}
