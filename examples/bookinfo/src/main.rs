//! The Bookinfo application: one program, a subcommand for each of its services and for its visitor.

mod details;
mod faults;
mod productpage;
mod ratings;
mod reviews;
mod server;
mod traffic;
mod upstream;

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The Bookinfo application.
#[derive(Parser)]
#[command(name = "bookinfo", version)]
struct Arguments {
    #[command(subcommand)]
    service: Service,
}

#[derive(Subcommand)]
enum Service {
    /// The page of a book: HTML for people, JSON under /api/v1.
    Productpage {
        #[command(flatten)]
        listen: Listen,
        /// Where details answer.
        #[arg(long, env = "DETAILS_URL", default_value = "http://details:9080")]
        details: String,
        /// Where reviews answer.
        #[arg(long, env = "REVIEWS_URL", default_value = "http://reviews:9080")]
        reviews: String,
        /// Where ratings answer.
        #[arg(long, env = "RATINGS_URL", default_value = "http://ratings:9080")]
        ratings: String,
    },
    /// What is known of a book.
    Details {
        #[command(flatten)]
        listen: Listen,
        #[command(flatten)]
        faults: faults::Options,
    },
    /// What readers say of a book.
    Reviews {
        #[command(flatten)]
        listen: Listen,
        /// v1 shows no stars, v2 black ones, v3 red ones.
        #[arg(long, env = "SERVICE_VERSION", default_value = "v1")]
        version: reviews::Version,
        /// Where ratings answer.
        #[arg(long, env = "RATINGS_URL", default_value = "http://ratings:9080")]
        ratings: String,
    },
    /// The stars that readers give.
    Ratings {
        #[command(flatten)]
        listen: Listen,
        #[command(flatten)]
        faults: faults::Options,
    },
    /// Visits a page again and again, and says how it went.
    Traffic {
        /// What is visited.
        #[arg(long, env = "TRAFFIC_URL", default_value = "http://productpage:9080/productpage")]
        url: String,
        /// Visits a second, 1 to 1000.
        #[arg(long, env = "TRAFFIC_RATE", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rate: u32,
        /// Who visits: the value of the header `end-user`.
        #[arg(long, env = "TRAFFIC_USER")]
        user: Option<hyper::header::HeaderValue>,
    },
}

#[derive(clap::Args)]
struct Listen {
    /// Where to listen.
    #[arg(long, env = "LISTEN", default_value = "[::]:9080")]
    listen: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let outcome = match Arguments::parse().service {
        Service::Productpage { listen, details, reviews, ratings } => {
            productpage::run(listen.listen, productpage::Upstreams { details, reviews, ratings }).await
        }
        Service::Details { listen, faults } => details::run(listen.listen, faults).await,
        Service::Reviews { listen, version, ratings } => reviews::run(listen.listen, version, ratings).await,
        Service::Ratings { listen, faults } => ratings::run(listen.listen, faults).await,
        Service::Traffic { url, rate, user } => traffic::run(&url, rate, user).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bookinfo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
