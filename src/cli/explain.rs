//! `trueup explain`

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgGroup, Args};
use serde::Serialize;

use super::output::{Style, emit, emit_json};
use super::progress::Progress;
use super::range::time;
use super::{Format, Session, explain_text};
use crate::audit::explain::{Asked, Change, Explanation, Figures, Row, explain};
use crate::config::Job;
use crate::ends;
use crate::fault::configuration;
use crate::model::aggregate::Values;
use crate::model::meter::Input;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::price_steps::PriceSteps;
use crate::pipeline::trace::CarriedIn;
use crate::pipeline::trace_events::{CountedEvent, SetAside};
use crate::pipeline::{Inputs, KeyCache};
use crate::reference::Reference;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("instant").required(true).args(["window", "period"]))]
pub struct ExplainArguments {
    /// The job file.
    job: PathBuf,

    /// The subscription.
    #[arg(long, value_name = "SUBSCRIPTION_ID")]
    subscription: String,

    /// The meter.
    #[arg(long, value_name = "METER_ID")]
    meter: String,

    /// The window that holds this time: a date (midnight in the job's zone) or RFC 3339.
    #[arg(long, value_name = "TIME")]
    window: Option<String>,

    /// The billing period that holds this time.
    #[arg(long, value_name = "TIME")]
    period: Option<String>,

    /// Only this tenant.
    #[arg(long, value_name = "TENANT_ID")]
    tenant: Option<String>,

    /// Only these values of dimensions: '{"model":"large"}'.
    #[arg(long, value_name = "JSON")]
    dimensions: Option<String>,

    /// Only this price.
    #[arg(long, value_name = "PRICE_ID")]
    price: Option<String>,

    /// Show every event, not only the first ones.
    #[arg(long)]
    all: bool,

    /// Events that a list of the JSON document holds at most.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    limit: usize,
}

pub fn execute(session: &Session, arguments: &ExplainArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let asked = arguments.asked(session, &job)?;
    let reference = Reference::load(&job)?;
    let (store, source) = (ends::read_store(&job)?, ends::source(&job)?);
    let progress = Progress::new(session.quiet);
    let inputs = Inputs {
        job: &job,
        reference: &reference,
        source: &*source,
        store: store.as_deref(),
        threads: session.threads,
        progress: &progress,
        keys: &KeyCache::default(),
    };
    let answers = explain(&inputs, &reference, &asked)?;
    drop(progress);
    match session.format {
        Format::Json => emit_json(&Document {
            schema: "trueup.explain/1",
            job: &job.name,
            explanations: answers.iter().map(|answer| document(answer, &asked)).collect(),
        })?,
        Format::Text => emit(&explain_text::text(&job, &asked, &answers, Style::for_stdout())?)?,
    }
    Ok(0)
}

impl ExplainArguments {
    fn asked(&self, session: &Session, job: &Job) -> Result<Asked> {
        let (at, of_period) = match (&self.window, &self.period) {
            (Some(window), _) => (time("--window", window, job.timezone)?, false),
            (None, Some(period)) => (time("--period", period, job.timezone)?, true),
            (None, None) => return Err(configuration("say which --window or which --period")),
        };
        let at = Timestamp::in_range(at.nanos());
        let at = at.ok_or_else(|| configuration("the time asked about is outside of the years 1700 to 2199"))?;
        let dimensions = self.dimensions.as_ref().map(|text| {
            serde_json::from_str(text).map_err(|error| {
                configuration(format!("--dimensions {text}: no JSON object such as '{{\"model\":\"large\"}}': {error}"))
            })
        });
        Ok(Asked {
            subscription: self.subscription.clone(),
            meter: self.meter.clone(),
            at,
            of_period,
            tenant: self.tenant.clone(),
            price: self.price.clone(),
            dimensions: dimensions.transpose()?,
            limit: match session.format {
                _ if self.all => usize::MAX,
                Format::Json => self.limit,
                Format::Text => explain_text::SHOWN,
            },
        })
    }
}

#[derive(Debug, Serialize)]
struct Document<'e> {
    schema: &'static str,
    job: &'e str,
    explanations: Vec<ExplanationDocument<'e>>,
}

#[derive(Debug, Serialize)]
struct ExplanationDocument<'e> {
    tenant_id: &'e str,
    subscription_id: &'e str,
    meter_id: &'e str,
    about: &'static str,
    rows: Vec<RowDocument<'e>>,
    set_aside: SetAsideDocument<'e>,
    reference: ReferenceDocument<'e>,
}

#[derive(Debug, Serialize)]
struct RowDocument<'e> {
    price_id: &'e str,
    dimensions: &'e str,
    period_start: Timestamp,
    /// `None` where it is about a period.
    window_start: Option<Timestamp>,
    differs: bool,
    stored: Option<&'e Figures>,
    computed: Option<&'e Figures>,
    price: Option<PriceDocument<'e>>,
    price_steps: &'e PriceSteps,
    carried_in: Option<CarriedIn>,
    events: EventsDocument<'e>,
    history: Vec<ChangeDocument<'e>>,
}

#[derive(Debug, Serialize)]
struct EventsDocument<'e> {
    total: u64,
    events: Vec<&'e CountedEvent>,
}

#[derive(Debug, Serialize)]
struct SetAsideDocument<'e> {
    start: Timestamp,
    end: Timestamp,
    total: u64,
    events: Vec<&'e SetAside>,
}

#[derive(Debug, Serialize)]
struct PriceDocument<'e> {
    price_id: &'e str,
    plan_id: &'e str,
    model: &'static str,
    definition: &'e crate::model::price::PriceModel,
    options: &'e crate::model::price::PriceOptions,
    valid_from: Option<Timestamp>,
    valid_to: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct ReferenceDocument<'e> {
    customers: Vec<CustomerDocument<'e>>,
    subscription: Option<SubscriptionDocument<'e>>,
    meter: Option<MeterDocument<'e>>,
}

#[derive(Debug, Serialize)]
struct CustomerDocument<'e> {
    external_customer_id: &'e str,
    customer_id: Option<&'e str>,
    valid_from: Option<Timestamp>,
    valid_to: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct SubscriptionDocument<'e> {
    subscription_id: &'e str,
    customer_id: &'e str,
    plan_id: &'e str,
    currency: &'e str,
    billing_period: &'static str,
    anchor: Option<String>,
    timezone: &'static str,
    started_at: Option<Timestamp>,
    ended_at: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct MeterDocument<'e> {
    meter_id: &'e str,
    event_name: &'e str,
    aggregation: &'static str,
    property: Option<&'e str>,
    expression: Option<&'e str>,
    filters: Vec<String>,
    dimensions: &'e [String],
    window: String,
    charge_on: &'static str,
}

#[derive(Debug, Serialize)]
struct ChangeDocument<'e> {
    run_id: &'e str,
    finished_at: Option<Timestamp>,
    started_by: Option<&'e str>,
    kind: &'e str,
    causes: &'e BTreeMap<String, u64>,
    before: Option<Values>,
    after: Option<Values>,
}

fn start_of(span: Span) -> Option<Timestamp> {
    Some(span.start).filter(|start| *start != Timestamp::MIN)
}

fn end_of(span: Span) -> Option<Timestamp> {
    Some(span.end).filter(|end| *end != Timestamp::MAX)
}

fn document<'e>(answer: &'e Explanation<'_>, asked: &'e Asked) -> ExplanationDocument<'e> {
    ExplanationDocument {
        tenant_id: &answer.tenant_id,
        subscription_id: &asked.subscription,
        meter_id: &asked.meter,
        about: if asked.of_period { "period" } else { "window" },
        rows: answer.rows.iter().map(|row| row_document(row, asked)).collect(),
        set_aside: SetAsideDocument {
            start: answer.span.start,
            end: answer.span.end,
            total: answer.set_aside.total,
            events: answer.set_aside.events().collect(),
        },
        reference: reference_document(answer),
    }
}

fn row_document<'e>(row: &'e Row<'_>, asked: &Asked) -> RowDocument<'e> {
    RowDocument {
        price_id: &row.key.period.price_id,
        dimensions: &row.key.period.dimensions,
        period_start: row.key.period.period_start,
        window_start: (!asked.of_period).then_some(row.key.window_start),
        differs: row.differs(),
        stored: row.stored.as_ref(),
        computed: row.computed.as_ref(),
        price: row.price.map(|price| PriceDocument {
            price_id: &price.id,
            plan_id: &price.plan_id,
            model: price.model.name(),
            definition: &price.model,
            options: &price.options,
            valid_from: start_of(price.valid),
            valid_to: end_of(price.valid),
        }),
        price_steps: &row.steps,
        carried_in: row.carried_in,
        events: EventsDocument { total: row.events.total, events: row.events.events().collect() },
        history: row.history.iter().map(change_document).collect(),
    }
}

fn change_document(change: &Change) -> ChangeDocument<'_> {
    ChangeDocument {
        run_id: &change.run_id,
        finished_at: change.run.as_ref().map(|run| run.finished_at),
        started_by: change.run.as_ref().map(|run| run.origin.started_by.as_str()),
        kind: &change.kind,
        causes: &change.causes,
        before: change.before,
        after: change.after,
    }
}

fn reference_document<'e>(answer: &'e Explanation<'_>) -> ReferenceDocument<'e> {
    let customer = |(id, span): &(&'e str, Span)| CustomerDocument {
        external_customer_id: id,
        customer_id: answer.subscription.map(|subscription| subscription.customer_id.as_str()),
        valid_from: start_of(*span),
        valid_to: end_of(*span),
    };
    ReferenceDocument {
        customers: answer.customers.iter().map(customer).collect(),
        subscription: answer.subscription.map(|subscription| SubscriptionDocument {
            subscription_id: &subscription.id,
            customer_id: &subscription.customer_id,
            plan_id: &subscription.plan_id,
            currency: &subscription.currency,
            billing_period: subscription.cycle.length.name(),
            anchor: subscription.cycle.anchor.map(|anchor| anchor.to_string()),
            timezone: subscription.cycle.timezone.name(),
            started_at: start_of(subscription.active),
            ended_at: end_of(subscription.active),
        }),
        meter: answer.meter.map(|meter| MeterDocument {
            meter_id: &meter.id,
            event_name: &meter.event_name,
            aggregation: meter.aggregation.name(),
            property: if let Input::Property(property) = &meter.input { Some(property) } else { None },
            expression: if let Input::Expression(expression) = &meter.input { Some(expression.text()) } else { None },
            filters: meter.filters.iter().map(ToString::to_string).collect(),
            dimensions: &meter.dimensions,
            window: meter.window.to_string(),
            charge_on: meter.charge_on.name(),
        }),
    }
}
