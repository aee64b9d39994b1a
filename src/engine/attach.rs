//! I/O of one drafted completion: carries out the session's actions and feeds events back.
//!
//! Three calls run at once: the *follow*, a long poll that reports what the target commits; the *offer*, which sends draft
//! tokens; and the *stream* of each drafter. None of them is on the path of the client's answer.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, OptionFuture, select_all};
use tokio::sync::watch as channel;
use tokio::time::Instant;

use super::batch_load::ActiveCompletion;
use super::busy_clock::BusyClock;
use super::draft_stream::{DrafterStream, StreamItem};
use super::drafter::{DRAFTER_TIMEOUT, DrafterEvent, SessionDrafter};
use super::prediction;
use super::watch::{ClusterSnapshot, ConfiguredServer, DraftProtocol};
use super::{Counts, EngineState};
use crate::speculation::{
    Offer, PendingDraft, Session, SessionAction, SessionContext, SessionEvent, StepSample, Token, TokenClass,
};
use crate::upstream::{DraftAnswer, DraftCall, DraftPiece, DraftState, LlamaServer, StreamEnd, UpstreamError};

/// Pause after a failure of the target.
const BACK_OFF: Duration = Duration::from_millis(100);

/// A draft that takes less than the rest of the step by this factor arrives before the step ends.
const SURELY: f64 = 1.5;

/// The servers of a drafting session.
pub(super) struct SessionServers {
    /// The drafters; without one, drafts are only looked up in the text.
    pub(super) drafts: Vec<ConfiguredServer>,
    pub(super) target: LlamaServer,
}

/// Runs until the completion ends; cancel it by dropping the future. `prediction` is what the client expects of the answer.
pub(super) async fn run(
    shared: Arc<EngineState>,
    servers: SessionServers,
    key: String,
    prediction: Option<String>,
    counts: channel::Sender<Counts>,
) {
    let snapshot = shared.snapshot.subscribe();
    let prediction = match prediction {
        Some(text) => {
            let seen = snapshot.borrow().clone();
            prediction::tokens(&seen, text, async |text| servers.target.tokenize(&text).await).await
        }
        None => Vec::new(),
    };
    let mut attached = AttachedCompletion {
        session: Session::new(&prediction, servers.drafts.len()),
        follow: None,
        offer: None,
        next_offer: None,
        drafters: servers.drafts.into_iter().map(SessionDrafter::new).collect(),
        answered: DraftAnswer::none(),
        began: Instant::now(),
        stepped: Instant::now(),
        worked: shared.busy_clock.iter().map(BusyClock::total).collect(),
        completion: shared.batch_load.join(),
        finished: false,
        counts,
        shared,
        target: servers.target,
        key,
        snapshot,
    };
    let begin = attached.session.begin();
    attached.act(begin);
    while !attached.finished {
        attached.turn().await;
    }
}

type OfferResult = Result<DraftAnswer, UpstreamError>;

struct AttachedCompletion {
    shared: Arc<EngineState>,
    target: LlamaServer,
    key: String,
    snapshot: channel::Receiver<ClusterSnapshot>,
    counts: channel::Sender<Counts>,
    session: Session,
    follow: Option<BoxFuture<'static, OfferResult>>,
    /// With the time when it was sent.
    offer: Option<(Instant, BoxFuture<'static, OfferResult>)>,
    /// The newest offer, while an older one is on its way.
    next_offer: Option<Offer>,
    drafters: Vec<SessionDrafter>,
    /// The target's last answer.
    answered: DraftAnswer,
    began: Instant,
    /// When the target's last step was reported.
    stepped: Instant,
    /// How long each drafter had been busy by then.
    worked: Vec<Duration>,
    completion: ActiveCompletion,
    finished: bool,
}

/// An event to handle.
enum AttachEvent {
    Followed(OfferResult),
    Offered(OfferResult),
    /// By the drafter of this number.
    Drafted(usize, DrafterEvent),
    /// The snapshot of the servers changed.
    Seen,
}

impl AttachedCompletion {
    /// Waits for the next event and handles it.
    async fn turn(&mut self) {
        match self.next().await {
            AttachEvent::Followed(answer) => {
                self.follow = None;
                self.answered(answer, true);
            }
            AttachEvent::Offered(answer) => {
                if let Some((asked, _)) = self.offer.take() {
                    self.shared.policy().record_round_trip(asked.elapsed());
                }
                self.answered(answer, false);
                if self.offer.is_none()
                    && let Some(next) = self.next_offer.take()
                {
                    self.send_offer(&next);
                }
            }
            AttachEvent::Drafted(drafter, DrafterEvent::Pieces(pieces)) => self.drafted(drafter, pieces),
            AttachEvent::Drafted(drafter, DrafterEvent::Silent) => {
                self.drafter_failed(drafter, "it has been silent for too long");
            }
            AttachEvent::Drafted(drafter, DrafterEvent::RetryDue) => {
                self.drafters[drafter].retry_at = None;
                self.check_available();
            }
            AttachEvent::Seen => self.check_available(),
        }
    }

    async fn next(&mut self) -> AttachEvent {
        let drafters = self.drafters.iter_mut().map(|drafter| drafter.next().boxed());
        let drafters: Vec<_> = drafters.collect();
        let any = OptionFuture::from((!drafters.is_empty()).then(|| select_all(drafters)));
        tokio::select! {
            Some(answer) = OptionFuture::from(self.follow.as_mut()) => AttachEvent::Followed(answer),
            Some(answer) = OptionFuture::from(self.offer.as_mut().map(|(_, answer)| answer)) => AttachEvent::Offered(answer),
            Some((drafted, number, _)) = any => AttachEvent::Drafted(number, drafted),
            Ok(()) = self.snapshot.changed() => AttachEvent::Seen,
        }
    }

    /// Handles the target's answer to a follow or an offer.
    fn answered(&mut self, answer: OfferResult, followed: bool) {
        match answer {
            Ok(answer) => match answer.state {
                DraftState::Unknown if self.session.committed().is_empty() => {
                    // It is not launched yet; the server has made us wait for it already.
                    if followed {
                        self.follow_after(Duration::from_millis(20));
                    }
                }
                DraftState::Unknown | DraftState::Done | DraftState::Refused => {
                    if let Some(reason) = &answer.reason {
                        tracing::debug!("the target refuses drafts for an answer: {reason}");
                    }
                    if answer.state == DraftState::Done {
                        self.count(answer);
                    }
                    self.handle(SessionEvent::Ended);
                }
                DraftState::Waiting | DraftState::Running => {
                    let (pos, tokens) = (answer.pos, answer.tokens.clone());
                    let streams = self.drafters.iter_mut().filter_map(|it| it.stream.as_mut());
                    streams.filter(|_| !tokens.is_empty()).for_each(DrafterStream::wake);
                    self.count(answer);
                    self.handle(SessionEvent::Committed { pos, tokens, followed });
                    self.check_available();
                }
            },
            Err(UpstreamError::Refused { status, message, .. }) if (400..500).contains(&status) => {
                tracing::warn!("the target refuses drafts: {status} {message}");
                self.handle(SessionEvent::Ended);
            }
            Err(error) => {
                tracing::debug!("{error}");
                if followed {
                    self.follow_after(BACK_OFF);
                }
            }
        }
    }

    /// Learns from the target's counts. An answer that was overtaken by a later one is ignored.
    fn count(&mut self, answer: DraftAnswer) {
        let old = &self.answered;
        if answer.n_steps < old.n_steps {
            return;
        }
        tracing::trace!(
            steps = answer.n_steps,
            drafted = answer.step_n,
            accepted = answer.step_accepted,
            batch = answer.step_batch,
            us = answer.step_us,
            since = ?self.stepped.elapsed(),
            n_max = answer.n_max,
            "step"
        );
        if answer.n_steps > old.n_steps {
            let since_last = std::mem::replace(&mut self.stepped, Instant::now()).elapsed();
            let duration = Duration::from_micros(answer.step_us);
            let clocks = self.worked.iter_mut().zip(&self.shared.busy_clock);
            let beside_drafts: Vec<f64> = clocks
                .map(|(before, clock)| {
                    let worked = clock.total();
                    let at_work = worked.saturating_sub(std::mem::replace(before, worked));
                    beside(duration, since_last, at_work)
                })
                .collect();
            // The first step is the prompt's; of steps that went by unseen it is not known what they verified.
            if answer.n_steps == old.n_steps + 1 && answer.n_steps > 1 {
                let step = StepSample {
                    drafted: answer.step_n,
                    accepted: answer.step_accepted,
                    duration,
                    since_last,
                    batch: answer.batch_without_own_draft(),
                };
                self.shared.policy().record_step(&step, &beside_drafts);
            }
            self.completion.steps(answer.step_tokens());
        }
        let end = (answer.pos + answer.tokens.len()).max(self.session.committed().len());
        let (accepted, rejected) = predicted(
            self.session
                .offered(whole(answer.n_drafted.saturating_sub(old.n_drafted))),
            whole(answer.n_accepted.saturating_sub(old.n_accepted)),
        );
        let before = *self.counts.borrow();
        let counts = Counts {
            steps: answer.n_steps,
            drafted: answer.n_drafted,
            accepted: answer.n_accepted,
            generated: end.saturating_sub(answer.n_prompt) as u64,
            accepted_prediction_tokens: before.accepted_prediction_tokens + accepted,
            rejected_prediction_tokens: before.rejected_prediction_tokens + rejected,
        };
        self.counts.send_replace(counts);
        self.shared.totals().add(before, counts);
        self.answered = DraftAnswer {
            tokens: Vec::new(),
            ..answer
        };
    }

    fn drafted(&mut self, number: usize, pieces: Vec<StreamItem>) {
        let drafter = &mut self.drafters[number];
        let Some(id) = drafter.stream.as_ref().map(DrafterStream::id) else {
            return;
        };
        let mut tokens: Vec<(Token, Option<f64>)> = Vec::new();
        let mut end = None;
        for piece in pieces {
            match piece {
                Ok(DraftPiece::Tokens(more)) => tokens.extend(more),
                other => end = Some(other),
            }
        }
        // A token that the target's vocabulary lacks cannot be offered, and neither can the tokens after it.
        let known = tokens.iter().take_while(|(token, _)| drafter.is_known(*token)).count();
        if known < tokens.len() {
            tokens.truncate(known);
            end = Some(Ok(DraftPiece::End {
                why: StreamEnd::EndOfText,
                took: None,
            }));
        }
        if let Some(stream) = drafter.stream.as_mut().filter(|_| !tokens.is_empty()) {
            // The end of the text is a token too.
            let (ends, took) = match &end {
                Some(Ok(DraftPiece::End { why, took })) => (*why == StreamEnd::EndOfText && took.is_some(), *took),
                _ => (false, None),
            };
            let made = tokens.len() + usize::from(ends);
            let waits = self.session.target_waits_for(number, self.began.elapsed());
            let timing = stream.count(made, end.is_some(), took);
            let mut policy = self.shared.policy();
            if let Some(latency) = timing.first {
                policy.record_first_token(number, latency, waits);
            }
            if let Some((n, time)) = timing.further {
                policy.record_tokens(number, n, time, waits);
            }
            drop(policy);
            drafter.succeeded();
            let class = |p| TokenClass::of_probability(number, p);
            let classed = |(token, p): (Token, Option<f64>)| (token, p.map_or(TokenClass::of_drafter(number), class));
            let tokens = tokens.into_iter().map(classed).collect();
            self.handle(SessionEvent::Drafted { stream: id, tokens });
            let drafter = &mut self.drafters[number];
            if let (Some(stream), Some((_, server))) = (&mut drafter.stream, &drafter.protocol)
                && server.reports_timing()
            {
                stream.rest(self.session.slack() / 2);
            }
        }
        // The session may have ended this stream because of its tokens and begun another one.
        let current = &mut self.drafters[number].stream;
        match end {
            Some(Ok(DraftPiece::End { why, took })) => {
                if let Some(stream) = current.take_if(|stream| stream.id() == id) {
                    stream.end(took);
                }
                self.handle(SessionEvent::DraftEnded {
                    stream: id,
                    end_of_text: why == StreamEnd::EndOfText,
                });
            }
            Some(Err(error)) if current.as_ref().is_some_and(|stream| stream.id() == id) => {
                self.drafter_failed(number, &error.to_string());
            }
            _ => {}
        }
    }

    /// Stops the drafter's stream and schedules a retry.
    fn drafter_failed(&mut self, number: usize, why: &str) {
        let drafter = &mut self.drafters[number];
        tracing::debug!("the drafter {} failed: {why}", drafter.server.client.url());
        if let Some(stream) = drafter.stream.take() {
            let waits = self.session.target_waits_for(number, self.began.elapsed());
            self.shared.policy().record_silence(number, stream.silent(), waits);
        }
        drafter.failed();
        self.check_available();
    }

    /// Tells the session which drafters became available or unavailable.
    fn check_available(&mut self) {
        let protocols: Vec<Option<DraftProtocol>> = {
            let snapshot = self.snapshot.borrow_and_update();
            snapshot.drafts.iter().map(|draft| draft.protocol.clone()).collect()
        };
        for number in 0..self.drafters.len() {
            let drafter = &mut self.drafters[number];
            let protocol = protocols.get(number).cloned().flatten();
            let can_draft = protocol.is_some();
            if let Some(protocol) = protocol {
                drafter.set_protocol(protocol, &self.target);
            }
            let mut available = can_draft && drafter.retry_at.is_none() && !self.session.committed().is_empty();
            if available && drafter.lease.is_none() {
                drafter.lease = self.shared.slots[number].lease(self.session.committed());
                available = drafter.lease.is_some();
            }
            if available != drafter.available {
                drafter.available = available;
                self.handle(SessionEvent::Available {
                    drafter: number,
                    available,
                });
            }
        }
    }

    fn handle(&mut self, event: SessionEvent) {
        let pending = self.pending();
        let context = SessionContext {
            n_max: self.n_max(),
            pending: &pending,
            now: self.began.elapsed(),
            round_trip: self.shared.policy().round_trip(),
            load: self.completion.others(),
        };
        tracing::trace!(?event, ?context);
        let actions = {
            let mut policy = self.shared.policy();
            self.session.handle(event, &mut *policy, &context)
        };
        for action in actions {
            tracing::trace!(?action);
            self.act(action);
        }
    }

    fn n_max(&self) -> usize {
        let n_max = self.shared.cap.min(self.snapshot.borrow().n_max);
        if self.answered.state == DraftState::Running {
            n_max.min(self.answered.n_max)
        } else {
            n_max
        }
    }

    fn pending(&self) -> Vec<PendingDraft> {
        let drafters = self.drafters.iter().enumerate();
        let pending = drafters.filter_map(|(drafter, it)| {
            let stream = it.stream.as_ref()?;
            Some(PendingDraft {
                drafter,
                started: stream.begun(),
                silent_for: stream.silent(),
            })
        });
        pending.collect()
    }

    fn act(&mut self, action: SessionAction) {
        match action {
            SessionAction::Follow(offer) => self.follow = Some(self.post(&offer, true)),
            SessionAction::Offer(offer) if self.offer.is_some() => self.next_offer = Some(offer),
            SessionAction::Offer(offer) => self.send_offer(&offer),
            SessionAction::Draft {
                drafter,
                stream: id,
                prefix,
                n,
            } => {
                let it = &mut self.drafters[drafter];
                let (Some(lease), Some((_, server))) = (&it.lease, &it.protocol) else {
                    return;
                };
                let takes = self.shared.policy().draft_time(drafter, n);
                let enough = self.session.slack().min(DRAFTER_TIMEOUT);
                let at_once = takes.is_some_and(|takes| enough > takes.mul_f64(SURELY));
                let pieces = server.draft(prefix, n, lease.index(), at_once);
                it.stream = Some(DrafterStream::new(id, pieces, self.shared.busy_clock[drafter].begin()));
            }
            SessionAction::StopDraft { drafter } => {
                let Some(stream) = self.drafters[drafter].stream.take() else {
                    return;
                };
                let mut policy = self.shared.policy();
                if !stream.begun() {
                    let waits = self.session.target_waits_for(drafter, self.began.elapsed());
                    policy.record_silence(drafter, stream.silent(), waits);
                }
                stream.stop(policy.token_time(drafter));
            }
            SessionAction::Finish => self.finished = true,
        }
    }

    fn send_offer(&mut self, offer: &Offer) {
        if offer.pos == self.session.committed().len() {
            self.offer = Some((Instant::now(), self.post(offer, false)));
        }
    }

    fn follow_after(&mut self, pause: Duration) {
        let pos = self.session.committed().len();
        let poll = self.post(
            &Offer {
                pos,
                ..Offer::default()
            },
            true,
        );
        self.follow = Some(tokio::time::sleep(pause).then(|()| poll).boxed());
    }

    fn post(&self, offer: &Offer, wait: bool) -> BoxFuture<'static, OfferResult> {
        let (target, key, offer) = (self.target.clone(), self.key.clone(), offer.clone());
        async move {
            let Offer {
                pos,
                tokens,
                n_min,
                hold_us,
            } = &offer;
            let call = DraftCall {
                key: &key,
                pos: *pos,
                tokens,
                n_min: *n_min,
                hold_us: *hold_us,
                wait,
            };
            target.offer(&call).await
        }
        .boxed()
    }
}

/// Share of a pass during which a drafter was busy, given its busy time since the pass before. Busy time while the target
/// waited does not count.
fn beside(pass: Duration, since_last: Duration, at_work: Duration) -> f64 {
    let waited = since_last.saturating_sub(pass);
    let share = at_work.saturating_sub(waited).as_secs_f64() / pass.as_secs_f64();
    if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
}

/// Tokens of the client's prediction among the first `accepted` of `verified`, and among the rest.
fn predicted(verified: &[TokenClass], accepted: usize) -> (u64, u64) {
    let (accepted, rejected) = verified.split_at(accepted.min(verified.len()));
    let count = |classes: &[TokenClass]| classes.iter().filter(|class| class.is_predicted()).count() as u64;
    (count(accepted), count(rejected))
}

fn whole(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drafters_do_while_the_target_waits_is_not_beside_its_pass() {
        let share = |at_work| {
            beside(
                Duration::from_millis(40),
                Duration::from_millis(60),
                Duration::from_millis(at_work),
            )
        };
        let shares = [0, 20, 40, 60, 90].map(share);
        assert_eq!(
            shares.map(|share| format!("{share:.2}")),
            ["0.00", "0.00", "0.50", "1.00", "1.00"]
        );
        assert!(beside(Duration::ZERO, Duration::ZERO, Duration::ZERO) < 0.1);
    }

    #[test]
    fn only_tokens_of_the_prediction_are_counted_as_such() {
        let classes = [
            TokenClass::of_prediction(3),
            TokenClass::of_probability(0, 0.9),
            TokenClass::of_prediction(40),
            TokenClass::of_match(40),
            TokenClass::of_prediction(5),
        ];
        assert_eq!(predicted(&classes, 3), (2, 1));
        assert_eq!(predicted(&classes, 9), (3, 0));
        assert_eq!(predicted(&[], 2), (0, 0));
    }
}
