//! Why a number is what it is: computed anew with every event on its way, beside what
//! is stored and what the ledger says of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;

use crate::fault::configuration;
use crate::model::aggregate::{CorrectionKind, PeriodKey, PeriodRow, Values, WindowKey, WindowRow};
use crate::model::meter::Meter;
use crate::model::price::Price;
use crate::model::run::RunRecord;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::Inputs;
use crate::pipeline::price_steps::PriceSteps;
use crate::pipeline::trace::{CarriedIn, Question, Trace, TracedPeriod, TracedWindow, trace};
use crate::pipeline::trace_events::{CountedEvent, Listing, SetAside};
use crate::reference::{Reference, Subscription};
use crate::store::{Corrections, PeriodEntry};

/// What somebody asks.
#[derive(Debug, Clone)]
pub struct Asked {
    pub subscription: String,
    pub meter: String,
    pub at: Timestamp,
    pub of_period: bool,
    pub tenant: Option<String>,
    pub price: Option<String>,
    /// Dimension and value, each as it must be.
    pub dimensions: Option<serde_json::Map<String, serde_json::Value>>,
    pub limit: usize,
}

/// The answer for one subscription and meter.
pub struct Explanation<'r> {
    pub tenant_id: String,
    /// `None` where the table has it no more.
    pub subscription: Option<&'r Subscription>,
    pub customers: Vec<(&'r str, Span)>,
    pub meter: Option<&'r Meter>,
    pub rows: Vec<Row<'r>>,
    pub set_aside: Listing<SetAside>,
    /// The time that the set-aside events are from.
    pub span: Span,
}

/// One row, as it is stored and as it should be.
pub struct Row<'r> {
    /// `window_start` is the start of the period where it is about a period.
    pub key: WindowKey,
    pub price: Option<&'r Price>,
    pub stored: Option<Figures>,
    pub computed: Option<Figures>,
    pub steps: PriceSteps,
    pub events: Listing<CountedEvent>,
    pub carried_in: Option<CarriedIn>,
    pub history: Vec<Change>,
}

/// The numbers of a row.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Figures {
    pub customer_id: String,
    /// Of the window; of the period where it is about that.
    pub end: Timestamp,
    pub period_end: Timestamp,
    #[serde(flatten)]
    pub values: Values,
    pub currency: String,
    /// Of a period: cost and adjustments, rounded.
    pub amount: Option<crate::model::decimal::Decimal>,
    pub closed_at: Option<Timestamp>,
}

/// One correction of a row.
#[derive(Debug, Clone)]
pub struct Change {
    pub run_id: String,
    /// `None` where the run is not in the store.
    pub run: Option<RunRecord>,
    pub kind: String,
    pub causes: BTreeMap<String, u64>,
    pub before: Option<Values>,
    pub after: Option<Values>,
}

impl Figures {
    fn of_window(row: &WindowRow) -> Figures {
        Figures {
            customer_id: row.customer_id.to_string(),
            end: row.window_end,
            period_end: row.period_end,
            values: row.into(),
            currency: row.currency.to_string(),
            amount: None,
            closed_at: None,
        }
    }

    fn of_period(row: &PeriodRow, event_count: u64) -> Figures {
        Figures {
            customer_id: row.customer_id.to_string(),
            end: row.period_end,
            period_end: row.period_end,
            values: Values { quantity: row.quantity, cost: row.cost, event_count },
            currency: row.currency.to_string(),
            amount: Some(row.amount),
            closed_at: row.closed_at,
        }
    }

    /// Whether both say the same.
    pub fn agrees(&self, other: &Figures) -> bool {
        // The store does not count the events of a period, nor do events tell what is closed.
        let events = self.amount.is_some() || self.values.event_count == other.values.event_count;
        events
            && (&self.customer_id, self.end, self.period_end, &self.currency, self.amount)
                == (&other.customer_id, other.end, other.period_end, &other.currency, other.amount)
            && (self.values.quantity, self.values.cost) == (other.values.quantity, other.values.cost)
    }
}

/// Explains every row that is asked about; `reference` is that of the inputs.
///
/// # Errors
/// A configuration fault where there is no such subscription or meter; where the source
/// or the store cannot be read.
pub fn explain<'r>(inputs: &Inputs<'_>, reference: &'r Reference, asked: &Asked) -> Result<Vec<Explanation<'r>>> {
    let meter = reference.meters.iter().position(|meter| meter.id == asked.meter);
    let wants_tenant = |tenant: &str| asked.tenant.as_ref().is_none_or(|wanted| wanted == tenant);
    let is_it = |subscription: &Subscription| subscription.id == asked.subscription && wants_tenant(&subscription.tenant_id);
    let runs = inputs.store.map_or(Ok(Vec::new()), |store| store.runs(&inputs.job.name))?;
    let mut answers = Vec::new();
    let subscriptions = reference.subscriptions.iter().enumerate().filter(|(_, subscription)| is_it(subscription));
    for (index, subscription) in subscriptions {
        let question = meter.map(|meter| Question {
            subscription: index,
            meter,
            at: asked.at,
            of_period: asked.of_period,
            limit: asked.limit,
        });
        let traced = question.map_or(Ok(None), |question| trace(inputs, question))?;
        let (computed, set_aside, span) = Answer::split(traced, asked);
        let mut answer = Answer { inputs, reference, asked, tenant: &subscription.tenant_id, runs: &runs, computed };
        answers.push(Explanation {
            tenant_id: subscription.tenant_id.clone(),
            subscription: Some(subscription),
            customers: reference.customers_of(index),
            meter: meter.and_then(|meter| reference.meters.get(meter)),
            rows: answer.rows()?,
            set_aside,
            span,
        });
    }
    answers.extend(without_subscription(inputs, reference, asked, &runs, &answers)?);
    if meter.is_none() && answers.iter().all(|answer| answer.rows.is_empty()) {
        let known: Vec<_> = reference.meters.iter().map(|meter| meter.id.as_str()).collect();
        return Err(configuration(format!("--meter {}: there is no such meter (there are {})", asked.meter, known.join(", "))));
    }
    if answers.is_empty() {
        let of = asked.tenant.as_ref().map_or(String::new(), |tenant| format!(" of tenant {tenant}"));
        return Err(configuration(format!(
            "--subscription {}: neither the subscriptions table nor the store has it{of}",
            asked.subscription
        )));
    }
    Ok(answers)
}

/// Rows of subscriptions that are stored and in no table.
fn without_subscription<'r>(
    inputs: &Inputs<'_>,
    reference: &'r Reference,
    asked: &Asked,
    runs: &[RunRecord],
    known: &[Explanation<'_>],
) -> Result<Vec<Explanation<'r>>> {
    let at = Span { start: asked.at, end: Timestamp::from_nanos(asked.at.nanos().saturating_add(1)) };
    let Some(store) = inputs.store else { return Ok(Vec::new()) };
    let mut tenants: Vec<String> = Vec::new();
    let mut note = |key: &PeriodKey| {
        let is_known = known.iter().any(|answer| answer.tenant_id == *key.tenant_id);
        let is_asked = *key.subscription_id == *asked.subscription && *key.meter_id == *asked.meter;
        if is_asked && !is_known && asked.tenant.as_ref().is_none_or(|tenant| **tenant == *key.tenant_id) {
            tenants.push(key.tenant_id.to_string());
        }
    };
    store.windows(&inputs.job.name, at)?.iter().for_each(|stored| note(&stored.row.key.period));
    store.periods(&inputs.job.name, at)?.iter().for_each(|row| note(&row.key));
    tenants.sort();
    tenants.dedup();
    let of_tenant = |tenant: String| {
        let rows = Answer { inputs, reference, asked, tenant: &tenant, runs, computed: BTreeMap::new() }.rows()?;
        let (meter, set_aside) = (None, Listing::new(0));
        Ok(Explanation { tenant_id: tenant, subscription: None, customers: Vec::new(), meter, rows, set_aside, span: at })
    };
    tenants.into_iter().map(of_tenant).collect()
}

/// What was computed of a row.
struct Computed {
    figures: Figures,
    steps: PriceSteps,
    events: Listing<CountedEvent>,
    carried_in: Option<CarriedIn>,
}

/// Puts together the rows of one subscription.
struct Answer<'a, 'r> {
    inputs: &'a Inputs<'a>,
    reference: &'r Reference,
    asked: &'a Asked,
    tenant: &'a str,
    runs: &'a [RunRecord],
    computed: BTreeMap<WindowKey, Computed>,
}

impl<'r> Answer<'_, 'r> {
    fn split(traced: Option<Trace>, asked: &Asked) -> (BTreeMap<WindowKey, Computed>, Listing<SetAside>, Span) {
        let at = Span { start: asked.at, end: Timestamp::from_nanos(asked.at.nanos().saturating_add(1)) };
        let Some(Trace { windows, periods, set_aside, span }) = traced else {
            return (BTreeMap::new(), Listing::new(0), at);
        };
        let window = |TracedWindow { row, steps, events, carried_in }| {
            let figures = Figures::of_window(&row);
            (row.key, Computed { figures, steps, events, carried_in })
        };
        let period = |TracedPeriod { row, steps, events }: TracedPeriod| {
            let figures = Figures::of_period(&row, events.total);
            (of_period(row.key), Computed { figures, steps, events, carried_in: None })
        };
        (windows.into_iter().map(window).chain(periods.into_iter().map(period)).collect(), set_aside, span)
    }

    fn is_asked(&self, key: &PeriodKey) -> bool {
        let narrow = || {
            let Some(wanted) = &self.asked.dimensions else { return true };
            let has: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&key.dimensions).unwrap_or_default();
            wanted.iter().all(|(name, value)| has.get(name) == Some(value))
        };
        *key.tenant_id == *self.tenant
            && *key.subscription_id == *self.asked.subscription
            && *key.meter_id == *self.asked.meter
            && self.asked.price.as_ref().is_none_or(|price| **price == *key.price_id)
            && narrow()
    }

    fn rows(&mut self) -> Result<Vec<Row<'r>>> {
        let stored = self.stored()?;
        let mut computed = std::mem::take(&mut self.computed);
        computed.retain(|key, _| self.is_asked(&key.period));
        let mut history = self.history(|key, start| {
            let is_now = |key: &WindowKey| stored.contains_key(key) || computed.contains_key(key);
            // A row that was retracted has no end any more: its start tells.
            is_now(key) || start == Some(key.window_start)
        })?;
        let mut keys: Vec<_> = stored.keys().chain(computed.keys()).chain(history.keys()).cloned().collect();
        keys.sort();
        keys.dedup();
        let mut rows = Vec::new();
        for key in keys {
            let found = computed.remove(&key);
            let price = self.reference.prices.iter().find(|price| *price.id == *key.period.price_id);
            let (figures, (steps, events, carried_in)) = match found {
                Some(Computed { figures, steps, events, carried_in }) => (Some(figures), (steps, events, carried_in)),
                None => (None, (PriceSteps::default(), Listing::new(0), None)),
            };
            rows.push(Row {
                price,
                stored: stored.get(&key).cloned(),
                computed: figures,
                steps,
                events,
                carried_in,
                history: history.remove(&key).unwrap_or_default(),
                key,
            });
        }
        Ok(rows)
    }

    fn stored(&self) -> Result<BTreeMap<WindowKey, Figures>> {
        let Some(store) = self.inputs.store else { return Ok(BTreeMap::new()) };
        let job = &self.inputs.job.name;
        let at = Span { start: self.asked.at, end: Timestamp::from_nanos(self.asked.at.nanos().saturating_add(1)) };
        let mut found = BTreeMap::new();
        if self.asked.of_period {
            for row in store.periods(job, at)?.into_iter().filter(|row| self.is_asked(&row.key)) {
                let figures = Figures::of_period(&row, 0);
                found.insert(of_period(row.key), figures);
            }
            return Ok(found);
        }
        // A session that is computed can begin or end elsewhere than the stored one.
        let spans = self.computed.iter().map(|(key, one)| Span { start: key.window_start, end: one.figures.end });
        for stored in
            store.windows(job, spans.fold(at, Span::union))?.into_iter().filter(|stored| self.is_asked(&stored.row.key.period))
        {
            let row = stored.row;
            if row.window().contains(self.asked.at) || self.computed.contains_key(&row.key) {
                let figures = Figures::of_window(&row);
                found.insert(row.key.clone(), figures);
            }
        }
        Ok(found)
    }

    /// The corrections of the rows that `wants`, which gets the start of the window asked
    /// about, where the calendar tells it.
    fn history(&self, wants: impl Fn(&WindowKey, Option<Timestamp>) -> bool) -> Result<BTreeMap<WindowKey, Vec<Change>>> {
        let Some(store) = self.inputs.store else { return Ok(BTreeMap::new()) };
        let job = &self.inputs.job.name;
        let run = |run_id: &str| self.runs.iter().find(|run| run.run_id == run_id).cloned();
        let mut history: BTreeMap<WindowKey, Vec<Change>> = BTreeMap::new();
        if self.asked.of_period {
            store.period_ledger(job, &mut |entry| {
                let Some((key, before, after)) = period_change(&entry) else { return Ok(()) };
                let key = of_period(key);
                if self.is_asked(&key.period) && wants(&key, None) {
                    let kind = if entry.is_adjustment() { CorrectionKind::Adjust.name() } else { kind_of(before, after) };
                    let kind = kind.to_owned();
                    let (run, run_id) = (run(&entry.run_id), entry.run_id);
                    history.entry(key).or_default().push(Change { run_id, run, kind, causes: BTreeMap::new(), before, after });
                }
                Ok(())
            })?;
        }
        let start = self.window_start();
        let of = Corrections::OfMeter {
            tenant_id: self.tenant,
            subscription_id: &self.asked.subscription,
            meter_id: &self.asked.meter,
        };
        store.corrections(job, of, &mut |entry| {
            let causes: BTreeMap<String, u64> = serde_json::from_str(&entry.causes).unwrap_or_default();
            if self.asked.of_period {
                // Why a period changed, its windows tell.
                let changes = history.get_mut(&of_period(entry.key.period)).into_iter().flatten();
                for change in changes.filter(|change| change.run_id == *entry.run_id) {
                    causes.iter().for_each(|(cause, count)| *change.causes.entry(cause.clone()).or_default() += count);
                }
            } else if self.is_asked(&entry.key.period) && wants(&entry.key, start) {
                let (run, run_id, kind) = (run(&entry.run_id), entry.run_id.to_string(), entry.kind.to_string());
                let change = Change { run_id, run, kind, causes, before: entry.before, after: entry.after };
                history.entry(entry.key).or_default().push(change);
            }
            Ok(())
        })?;
        Ok(history)
    }

    /// The start of the window asked about, where the calendar tells it.
    fn window_start(&self) -> Option<Timestamp> {
        let meter = self.reference.meters.iter().find(|meter| meter.id == self.asked.meter)?;
        let crate::model::window::WindowKind::Tumbling(size) = meter.window else { return None };
        Some(size.window(self.asked.at, self.inputs.job.timezone).start)
    }
}

fn of_period(period: impl Into<Arc<PeriodKey>>) -> WindowKey {
    let period = period.into();
    WindowKey { window_start: period.period_start, period }
}

/// The key of a period and its values before and after; `None` for what cannot be read.
fn period_change(entry: &PeriodEntry) -> Option<(PeriodKey, Option<Values>, Option<Values>)> {
    let [before, after] = entry.rows().ok()?;
    let values = |row: &PeriodRow| Values { quantity: row.quantity, cost: row.cost, event_count: 0 };
    let key = after.as_ref().or(before.as_ref())?.key.clone();
    Some((key, before.as_ref().map(values), after.as_ref().map(values)))
}

fn kind_of(before: Option<Values>, after: Option<Values>) -> &'static str {
    match (before, after) {
        (None, _) => CorrectionKind::Insert.name(),
        (Some(_), Some(_)) => CorrectionKind::Update.name(),
        (Some(_), None) => CorrectionKind::Retract.name(),
    }
}

/// A validity for people.
pub fn validity(span: Span) -> String {
    match (span.start == Timestamp::MIN, span.end == Timestamp::MAX) {
        (true, true) => "always".to_owned(),
        (false, true) => format!("from {}", span.start),
        (true, false) => format!("until {}", span.end),
        (false, false) => format!("from {} until {}", span.start, span.end),
    }
}

impl Row<'_> {
    /// Whether the stored row is not what the events say.
    pub fn differs(&self) -> bool {
        match (&self.stored, &self.computed) {
            (Some(stored), Some(computed)) => !stored.agrees(computed),
            (None, None) => false,
            _ => true,
        }
    }
}
